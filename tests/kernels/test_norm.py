"""Norms in their short form: the same bits where the formula is Llama's, untouched where it is another."""

import pytest
import torch
import transformers
from torch import nn
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm

from coral_core.kernels.layers import ShortNorm, shorten_norms
from tests.tiny import tiny_target

WIDTH = 96


def filled(norm: nn.Module, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(0)
    nn.init.uniform_(norm.weight, 0.5, 2.0)
    return norm.to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 9])
def test_a_short_norm_gives_the_same_bits(dtype: torch.dtype, rows: int) -> None:
    norm, x_1ND = filled(LlamaRMSNorm(WIDTH, eps=1e-5), dtype), torch.randn(1, rows, WIDTH).to(dtype) * 30
    expected_1ND = norm(x_1ND)
    shorten_norms(norm)
    assert type(norm) is ShortNorm
    assert torch.equal(norm(x_1ND), expected_1ND)
    assert norm(x_1ND).dtype == dtype


@pytest.mark.parametrize(
    ("norm", "dtype"),
    [
        (Gemma3RMSNorm(WIDTH), torch.float32),  # its weight is an offset
        (Olmo2RMSNorm(WIDTH), torch.bfloat16),  # rounds after the weight
        (nn.RMSNorm(WIDTH), torch.float32),  # short already
    ],
)
def test_other_norms_stay(norm: nn.Module, dtype: torch.dtype) -> None:
    norm, kind = filled(norm, dtype), type(norm)
    shorten_norms(norm)
    assert type(norm) is kind


def test_a_norm_kept_in_float32_in_a_model_in_16_bits_stays() -> None:
    """gpt-oss's in float16: it gives what it is given, and its weight would make float32 of it."""
    model = nn.Sequential(nn.Linear(WIDTH, WIDTH).half(), GptOssRMSNorm(WIDTH))
    shorten_norms(model)
    assert model(torch.ones(1, WIDTH).half()).dtype == torch.float16


def test_another_formula_under_a_familiar_name_stays() -> None:
    class OffsetRMSNorm(LlamaRMSNorm):
        def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
            return super().forward(hidden_states) + hidden_states

    norm = OffsetRMSNorm(WIDTH)
    shorten_norms(norm)
    assert type(norm) is OffsetRMSNorm


def test_a_targets_norms_are_shortened() -> None:
    target = tiny_target("qwen3")
    kinds = {type(module) for module in target.model.modules() if "norm" in type(module).__name__.lower()}
    assert kinds == {ShortNorm}
    assert isinstance(target.model, transformers.Qwen3ForCausalLM)
