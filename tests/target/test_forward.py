"""What a forward of the target reads, keeps, and takes of memory."""

import warnings

import psutil
import pytest
import torch
import transformers

from coral_core.decoding.cache import SlotCache
from coral_core.decoding.measure import OVERHEAD, typical
from coral_core.errors import CoralWarning
from coral_core.kernels.layers import PackedLinear
from coral_core.target.load import wrap
from tests.tiny import SHAPE, tiny_engine, tiny_target


@torch.no_grad()
def test_of_the_hidden_states_those_that_are_tapped_are_kept() -> None:
    pytest.importorskip("transformers.utils.output_capturing")
    if not hasattr(transformers.utils.output_capturing, "selected_hidden_states"):
        pytest.skip("this version of transformers keeps the states of all layers")
    target, taps, ids_BT, outputs = tiny_target(layers=7), (2, 3, 4), torch.tensor([[3, 4, 5]]), []
    states = target.model.base_model(ids_BT, output_hidden_states=True).hidden_states
    hook = target.model.base_model.register_forward_hook(lambda module, inputs, out: outputs.append(out))
    given_BTI = target.tapping(taps).forward(ids_BT)
    hook.remove()
    assert torch.equal(given_BTI, torch.cat([*(states[layer] for layer in taps), states[-1]], dim=-1))
    kept = [*outputs[0].hidden_states, outputs[0].last_hidden_state]
    assert len({id(state) for state in kept if state is not None}) == 4


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral-sliding", "gemma3-mixed"])
def test_a_window_that_hides_nothing_needs_no_mask(family: str) -> None:
    """And the bits of a row are the same with one."""
    target = tiny_target(family)
    window = target.window
    assert target.causal_mask(0, window) is target.causal_mask(window - 1, 1) is None
    assert target.causal_mask(0, window + 1) is not None and target.causal_mask(window, 1) is not None
    ids_BT, position_BT, features = torch.arange(3, 3 + window)[None], torch.arange(window)[None], []
    for masked in (False, True):
        cache = SlotCache(2, window)
        for past, end in ((0, window - 1), (window - 1, window)):
            sees_TK = torch.ones(end - past, end).bool().tril(past)
            mask = target.mask(lambda window, sees_TK=sees_TK: sees_TK) if masked else None  # type: ignore[misc]
            row = slice(past, end)
            features.append(target.forward(ids_BT[:, row], position_BT=position_BT[:, row], mask=mask, cache=cache))
    assert torch.equal(features[0], features[2]) and torch.equal(features[1], features[3])


def test_a_window_as_long_as_the_context_is_none() -> None:
    config = transformers.MistralConfig(**SHAPE, sliding_window=SHAPE["max_position_embeddings"])
    assert wrap(transformers.AutoModelForCausalLM.from_config(config), None).window == 0


def test_memory_for_packed_weights_is_asked_for_what_reads_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """The layers and the LM head, and no vision tower, whose layers multiply nothing. A plain step reads the same."""
    size = {"hidden_size": 64, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = transformers.Mistral3Config(
        text_config={"model_type": "mistral", **SHAPE},
        vision_config={"model_type": "pixtral", **size, "image_size": 28, "patch_size": 14},
        image_token_index=95,
    )
    model = transformers.AutoModelForImageTextToText.from_config(config)
    text, head = model.model.language_model, model.lm_head
    matrices = sum(part.weight.nbytes for part in text.modules() if type(part) is torch.nn.Linear) + head.weight.nbytes
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2 * matrices))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        target = wrap(model, None)
    assert type(text.layers[0].mlp.up_proj) is PackedLinear
    engine = tiny_engine(target)
    drafted = sum(weight.numel() for weight in engine.drafter.parameters()) + head.weight.numel()
    read = sum(weight.numel() for weight in text.parameters()) - text.embed_tokens.weight.numel() + head.weight.numel()
    assert typical(engine, 1.0).level[1] == round(OVERHEAD + drafted / read, 4)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=2 * matrices - 1))
    with pytest.warns(CoralWarning, match="decoding is slower than it could be"):
        wrap(transformers.AutoModelForImageTextToText.from_config(config), None)
