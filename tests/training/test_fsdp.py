"""The unroll under FSDP2, on two gloo processes: the same training, and whole weights out of it.

accelerate itself shards on accelerators only; this covers what coral adds, the Unroll module and the state dicts.
"""

import socket

import pytest
import torch
from torch import distributed

from coral_core.drafter.config import DrafterConfig
from coral_core.store.batches import batches
from coral_core.store.store import Store
from coral_core.training import trainer
from coral_core.training.loop import CLIP_NORM
from coral_core.training.unroll import Unroll
from tests.training.helpers import tiny_spec, tiny_store


def three_steps(store, mesh):
    """Whole weights after three steps on one batch, sharded over `mesh` if there is one."""
    from torch.distributed.fsdp import fully_shard

    spec, lent, batch = tiny_spec(), store.lent(), next(batches(store, batch_size=3, seed=0))
    config = DrafterConfig(**store.manifest.facts["drafter_config"])
    unroll = Unroll(trainer.initial_drafter(config, seed=0), spec.unroll_steps)
    if mesh is not None:
        fully_shard(unroll, mesh=mesh)
    optimizer = torch.optim.AdamW(unroll.parameters(), lr=1e-3)
    for _ in range(3):
        loss, _ = trainer.make_objective(spec)(unroll(lent, batch), batch, lent)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unroll.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
    weights = trainer.distributed_state.get_model_state_dict(unroll, options=trainer.WHOLE)
    return {name: value.clone() for name, value in weights.items()}


def compare(rank, port, folder):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    store = Store.open(folder)
    plain, sharded = three_steps(store, None), three_steps(store, distributed.init_device_mesh("cpu", (2,)))
    for name, weight in plain.items():
        torch.testing.assert_close(sharded[name], weight, rtol=0, atol=1e-6)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_sharded_training_equals_plain_training(tmp_path):
    tiny_store(tmp_path / "data")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(compare, (port, tmp_path / "data"), nprocs=2)
