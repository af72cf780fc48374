"""The GPU kernel against its reference: in Triton's interpreter where Triton is, and on a GPU where one is."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from coral_core.head.groups import balanced_sizes
from coral_core.kernels.blocks import Best, fits, grouped_best


def grouped_best_reference(
    hidden_ND: torch.Tensor,
    rows_VD: torch.Tensor,
    start_G: torch.Tensor,
    chosen_NR: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> Best:
    """The kernel's result, row by row, all candidates kept."""
    start, logits, rows = start_G.tolist(), [], []
    for n, hidden_D in enumerate(hidden_ND):
        chosen_R = chosen_NR[n if chosen_NR.shape[0] > 1 else 0]
        row_C = torch.cat([torch.arange(start[g], start[g + 1], device=rows_VD.device) for g in chosen_R.tolist()])
        bias_C = 0 if bias_V is None else bias_V[row_C]
        logits.append(rows_VD[row_C].float() @ hidden_D.float() + bias_C)
        rows.append(row_C)
    pad = torch.nn.utils.rnn.pad_sequence
    return Best(pad(logits, batch_first=True, padding_value=-torch.inf), pad(rows, batch_first=True))


V, D, G = 350, 64, 5


def best(found: Best, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    logit_NR, place_NR = found.logit_NC.topk(count)
    return logit_NR, found.row_NC.gather(1, place_NR)


def agrees(device: str, dtype: torch.dtype, atol: float) -> None:
    """Shared and own groups, one row and several, with and without a bias; groups of 70 rows are two ragged tiles."""
    generator = torch.Generator().manual_seed(0)
    rows_VD = (torch.randn(V, D, generator=generator) / D**0.5).to(device, dtype)
    bias_V = torch.randn(V, generator=generator).to(device, dtype)
    start_G = torch.cat((torch.zeros(1), balanced_sizes(V, G).cumsum(0))).to(device, torch.int32)
    for rows, own, bias in ((1, False, None), (5, False, bias_V), (5, True, None)):
        hidden_ND = torch.randn(rows, D, generator=generator).to(device, dtype)
        routes = torch.stack([torch.randperm(G, generator=generator)[:3] for _ in range(rows if own else 1)])
        arguments = (hidden_ND, rows_VD, start_G, routes.to(device), bias)
        ours, expected = grouped_best(*arguments), grouped_best_reference(*arguments)
        logit_NR, row_NR = best(ours, 10)
        wanted_NR, wanted_row_NR = best(expected, 10)
        torch.testing.assert_close(logit_NR, wanted_NR, rtol=0, atol=atol)
        if dtype == torch.float32:
            assert torch.equal(row_NR, wanted_row_NR)


@pytest.mark.parametrize(
    ("dtype", "capability", "served"),
    [
        (torch.bfloat16, (7, 5), False),
        (torch.bfloat16, (8, 0), True),
        (torch.float16, (7, 5), True),
        (torch.float32, (7, 0), True),
    ],
)
def test_bfloat16_is_for_gpus_that_multiply_it(
    dtype: torch.dtype, capability: tuple[int, int], served: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    rows_VD = SimpleNamespace(shape=(V, D), is_cuda=True, dtype=dtype, device="cuda")
    lent = SimpleNamespace(logit_scale=1.0, logit_softcap=0.0)
    assert fits(lent, rows_VD) is served


def test_the_reference_by_hand() -> None:
    """Rows 0 and 1 are group 0, row 2 group 1: logits 0 and ln 3 of the first."""
    rows_VD = torch.tensor([[0.0], [1.0], [9.0]])
    hidden_ND = torch.tensor([[3.0]]).log()
    found = grouped_best_reference(hidden_ND, rows_VD, torch.tensor([0, 2, 3]), torch.tensor([[0]]))
    torch.testing.assert_close(found.logit_NC.exp(), torch.tensor([[1.0, 3.0]]))
    assert found.row_NC.tolist() == [[0, 1]]


def test_the_kernel_in_tritons_interpreter() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed")
    code = "import torch; from tests.kernels.test_blocks import agrees; agrees('cpu', torch.float32, 1e-5)"
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
def test_the_kernel_on_a_gpu(dtype: torch.dtype, atol: float) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    agrees("cuda", dtype, atol)
