"""`target.dtype: auto`: bfloat16 where it is faster, and the embedded model's answers as they ever were."""

from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file

from coral_core.errors import CoralError
from coral_core.kernels import precision as kernel
from coral_core.recipe.schema import TargetSpec, TrainSpec
from coral_core.target import checkpoint, gguf_file, load
from coral_core.target.load import load_target, pick_dtype
from coral_core.training import loop

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(("times", "wanted"), [(0.5, torch.bfloat16), (1.05, torch.float32)])
@pytest.mark.parametrize("weights", [load.LARGE, None])
def test_a_large_model_takes_what_is_faster(
    times: float, wanted: torch.dtype, weights: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(load, "bfloat16_over_float32", lambda: times)
    assert pick_dtype("auto", CPU, lambda: weights) == wanted
    assert pick_dtype("bfloat16", CPU, lambda: weights) == torch.bfloat16


def test_a_small_one_and_a_gpu_are_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "bfloat16_over_float32", lambda: pytest.fail("measured"))
    assert pick_dtype("auto", CPU, lambda: load.LARGE - 1) == torch.float32
    assert pick_dtype("bfloat16", CPU, lambda: load.LARGE - 1) == torch.bfloat16
    assert pick_dtype("float32", CPU, lambda: pytest.fail("asked")) == torch.float32
    assert pick_dtype("auto", GPU, lambda: pytest.fail("asked")) == torch.bfloat16
    assert pick_dtype("float16", GPU, lambda: pytest.fail("asked")) == torch.float16
    assert load_target(TargetSpec(model="pico")).dtype == torch.float32


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


SLOWER = "target.dtype is bfloat16, and a tree of drafts takes this processor 2.5 times as long in it as in float32. "
AUTO = f"{SLOWER}Set target.dtype=auto; float32 takes twice the memory"
ROOM = f"{SLOWER}Float32 would take 28.0 GB of this machine's 34.0"


@pytest.mark.parametrize(
    ("asked", "times", "memory_gb", "wanted", "said"),
    [
        ("bfloat16", 2.5, 35, torch.bfloat16, AUTO),
        ("bfloat16", 2.5, 34, torch.bfloat16, ROOM),
        ("bfloat16", 1.05, 34, torch.bfloat16, None),
        ("auto", 2.5, 35, torch.float32, None),
        ("auto", 2.5, 34, torch.bfloat16, ROOM),
        ("auto", 1.05, 34, torch.bfloat16, None),
        ("auto", 0.5, 34, torch.bfloat16, None),
    ],
)
def test_a_processor_slow_in_bfloat16_takes_it_for_want_of_memory_alone(
    asked: str,
    times: float,
    memory_gb: int,
    wanted: torch.dtype,
    said: str | None,
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    """Seven billion weights: four fifths of 35 GB are what they take in float32."""
    monkeypatch.setattr(load, "bfloat16_over_float32", lambda: times)
    memory = psutil.virtual_memory()._replace(total=memory_gb * 10**9)
    monkeypatch.setattr(load.psutil, "virtual_memory", lambda: memory)
    assert pick_dtype(asked, CPU, lambda: 7 * 10**9) == wanted
    assert [str(warning.message) for warning in recwarn] == ([said] if said else [])


def test_the_weights_are_counted_by_the_headers_of_their_files(tmp_path: Path) -> None:
    """Whatever dtype they are stored in, and once where Mistral's own form lies beside them."""
    parts = {
        "model-00001-of-00002": torch.ones(3, 5),
        "model-00002-of-00002": torch.ones(7).half(),
        "consolidated": torch.ones(22),
    }
    for name, weight in parts.items():
        save_file({"weight": weight}, tmp_path / f"{name}.safetensors")
    assert checkpoint.weights(str(tmp_path), {}) == 22
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"damaged")
    assert checkpoint.weights(str(tmp_path), {}) is None
    assert checkpoint.weights("owner/absent", {"local_files_only": True}) is None


def test_a_gguf_whose_dequantised_copy_is_damaged_is_left_to_the_loader(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"damaged")
    monkeypatch.setattr(gguf_file, "_known", lambda *_: tmp_path)
    assert gguf_file.weights(tmp_path / "model.gguf") is None
    save_file({"weight": torch.ones(3, 5)}, tmp_path / "model.safetensors")
    assert gguf_file.weights(tmp_path / "model.gguf") == 15


@pytest.mark.parametrize(
    ("device", "faster", "wanted"),
    [("cuda", False, "bf16"), ("cpu", True, "bf16"), ("cpu", False, "no"), ("meta", True, "no")],
)
def test_mixed_precision_is_what_a_device_is_faster_in(
    device: str, faster: bool, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: not including_emulation)
    monkeypatch.setattr(kernel, "bfloat16_is_faster", lambda: faster)
    assert kernel.mixed_precision(torch.device(device)) == wanted


def test_a_processor_without_gradients_in_bfloat16_trains_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("DNNL does not support bf16/f16 backward on the platform with avx2_vnni_2\nmore")

    assert not kernel.no_gradient_in_bfloat16.__wrapped__()
    monkeypatch.setattr(kernel, "bfloat16_is_faster", lambda: True)
    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(kernel, "no_gradient_in_bfloat16", kernel.no_gradient_in_bfloat16.__wrapped__)
    assert kernel.mixed_precision(CPU) == "no"
    with pytest.raises(CoralError, match=r"bf16 does not work on this machine: DNNL .*2\. Set train\.precision=auto"):
        monkeypatch.setattr(loop, "no_gradient_in_bfloat16", kernel.no_gradient_in_bfloat16)
        loop.make_accelerator(TrainSpec(precision="bf16"), Path())


@pytest.mark.parametrize(("times", "said"), [(2.5, True), (0.5, False)])
def test_a_training_in_bfloat16_that_is_slow_here_is_told(
    times: float, said: bool, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    monkeypatch.setattr(loop, "bfloat16_over_float32", lambda: times)
    monkeypatch.setattr(loop, "no_gradient_in_bfloat16", lambda: "")
    monkeypatch.setattr(loop.accelerate, "Accelerator", lambda **_: None)
    loop.make_accelerator(TrainSpec(precision="bf16"), Path())
    loop.make_accelerator(TrainSpec(precision="no"), Path())
    text = "train.precision is bf16, and products take this processor 2.5 times as long in it as in float32. "
    assert [str(one.message) for one in recwarn] == said * [f"{text}Set train.precision=auto"]


def test_one_turn_is_enough_where_bfloat16_is_plainly_slower(monkeypatch: pytest.MonkeyPatch) -> None:
    for slower, products in ((kernel.PLAIN + 1, 1), (kernel.PLAIN - 1, kernel.TURNS)):
        calls: list[torch.dtype] = []
        kernel.bfloat16_over_float32.cache_clear()
        monkeypatch.setattr(torch.nn.functional, "linear", lambda x_ND, _, calls=calls: calls.append(x_ND.dtype))
        cost = {torch.float32: 1, torch.bfloat16: slower}
        monkeypatch.setattr(kernel.time, "thread_time", lambda calls=calls, cost=cost: sum(map(cost.get, calls)))
        assert kernel.bfloat16_over_float32() == slower
        assert len(calls) == products * 2 * kernel.MATRICES * len(kernel.ROWS)
    kernel.bfloat16_over_float32.cache_clear()
