"""`target.dtype: auto`: bfloat16 where it is faster, and the embedded model's answers as they ever were."""

from pathlib import Path

import pytest
import torch

from coral_core import embedded
from coral_core.kernels import precision as kernel
from coral_core.target import load
from coral_core.target.load import pick_dtype

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("faster", "wanted"), [(True, torch.bfloat16), (False, torch.float32)])
def test_a_large_checkpoint_takes_what_is_faster(
    faster: bool, wanted: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "bfloat16_is_faster", lambda: faster)
    monkeypatch.setattr(load, "LARGE_BYTES", 10)
    (tmp_path / "model.safetensors").write_bytes(b"x" * 11)
    (tmp_path / "model.gguf").write_bytes(b"x" * 4)
    for checkpoint in (tmp_path, tmp_path / "model.gguf", None):
        assert pick_dtype("auto", CPU, checkpoint) == wanted
    assert pick_dtype("float32", CPU, tmp_path) == torch.float32
    assert pick_dtype("bfloat16", CPU, tmp_path) == torch.bfloat16


def test_a_small_one_and_a_gpu_are_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "bfloat16_is_faster", lambda: pytest.fail("measured"))
    (tmp_path / "model.safetensors").write_bytes(b"x" * 11)
    assert pick_dtype("auto", CPU, tmp_path) == torch.float32
    assert pick_dtype("auto", CPU, embedded.FOLDER / "target") == torch.float32


def test_the_faster_one_is_told_by_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock goes 1, 3, 1, 3, … seconds for float32 and bfloat16 by turns, then the other way round."""
    for seconds, faster in (((3.0, 1.0), True), ((1.0, 3.0), False), ((1.05, 1.0), False)):
        calls = iter(range(1000))

        def clock(calls: object = calls, seconds: tuple[float, float] = seconds) -> float:
            call = next(calls)  # type: ignore[call-overload]
            return 100.0 * (call // 2) + (call % 2) * seconds[call // 2 % 2]

        monkeypatch.setattr(kernel.time, "thread_time", clock)
        assert kernel.bfloat16_is_faster.__wrapped__() is faster
