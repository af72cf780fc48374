"""`target.dtype: auto`: bfloat16 where it is faster, and the embedded model's answers as they ever were."""

from pathlib import Path
from types import SimpleNamespace

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
    monkeypatch.setattr(load, "bfloat16_over_float32", lambda: 1.0)
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
        kernel.bfloat16_over_float32.cache_clear()
        assert kernel.bfloat16_is_faster() is faster
    kernel.bfloat16_over_float32.cache_clear()


SLOWER = (
    "target.dtype is bfloat16, and products of many rows take this processor 2.5 times as long in bfloat16 "
    "as in float32"
)


@pytest.mark.parametrize(
    ("asked", "times", "free", "wanted", "said"),
    [
        ("bfloat16", 2.5, 22, torch.bfloat16, f"{SLOWER}. Set target.dtype=auto; float32 takes twice the memory"),
        ("bfloat16", 2.5, 21, torch.bfloat16, f"{SLOWER}; float32 would take 0.0 GB, of which 0.0 GB are free"),
        ("bfloat16", 1.05, 21, torch.bfloat16, None),
        ("auto", 2.5, 22, torch.float32, None),
        ("auto", 2.5, 21, torch.bfloat16, f"{SLOWER}; float32 would take 0.0 GB, of which 0.0 GB are free"),
        ("auto", 1.05, 22, torch.float32, None),
        ("auto", 0.5, 21, torch.bfloat16, None),
    ],
)
def test_a_processor_slow_in_bfloat16_takes_it_for_want_of_memory_alone(
    asked: str,
    times: float,
    free: int,
    wanted: torch.dtype,
    said: str | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Eleven bytes in 16 bits are large here; a folder's files and the index of parts on the Hub say so alike."""
    monkeypatch.setattr(load, "bfloat16_over_float32", lambda: times)
    monkeypatch.setattr(kernel, "bfloat16_over_float32", lambda: times)
    monkeypatch.setattr(load, "LARGE_BYTES", 10)
    monkeypatch.setattr(load.psutil, "virtual_memory", lambda: SimpleNamespace(available=free))
    index = tmp_path / "model.safetensors.index.json"
    (tmp_path / "model.safetensors").write_bytes(b"x" * 11)
    index.write_text('{"metadata": {"total_size": 11}}')
    for checkpoint in (tmp_path, index):
        assert pick_dtype(asked, CPU, checkpoint) == wanted
        assert pick_dtype("bfloat16", GPU, checkpoint) == torch.bfloat16
    assert {str(warning.message) for warning in recwarn} == ({said} if said else set())


@pytest.mark.parametrize(
    ("cuda", "faster", "wanted"), [(True, False, "bf16"), (False, True, "bf16"), (False, False, "no")]
)
def test_mixed_precision_is_what_this_machine_is_faster_in(
    cuda: bool, faster: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(kernel, "bfloat16_is_faster", lambda: faster)
    assert kernel.mixed_precision("auto") == wanted
    assert [kernel.mixed_precision(named) for named in ("no", "bf16", "fp16")] == ["no", "bf16", "fp16"]
