"""Random two-layer targets of many families, and drafters of known character, for tests on a laptop."""

import dataclasses
import functools
import math
import random
from types import SimpleNamespace

import torch
import transformers

from coral_core.decoding.engine import Engine
from coral_core.decoding.policy.plan import TreeShape
from coral_core.decoding.rounds import Round
from coral_core.drafter.blocks import CosSin
from coral_core.drafter.config import DrafterConfig
from coral_core.drafter.model import Drafter
from coral_core.head.heads import Candidates
from coral_core.target.load import drafter_shape, wrap
from coral_core.target.target import Target

VOCAB = 96
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 160,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.4,  # wide, so that the argmax is decided by far more than rounding
}
FAMILIES = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "mistral-sliding": ("MistralConfig", {"sliding_window": 7}),
    "gemma": ("GemmaConfig", {}),
    "gemma2-mixed": ("Gemma2Config", {"sliding_window": 6, "final_logit_softcapping": 5.0}),
    "gemma3-mixed": ("Gemma3TextConfig", {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]}),
    "gemma4-shared": (  # the last layer reads the keys and values of the one before
        "Gemma4TextConfig",
        {
            "layer_types": ["full_attention"],
            "num_kv_shared_layers": 1,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": VOCAB,
            "tie_word_embeddings": False,
        },
    ),
    "phi3": ("Phi3Config", {"original_max_position_embeddings": 160}),
    "gpt-neox": ("GPTNeoXConfig", {"num_key_value_heads": None}),
    "gpt2": ("GPT2Config", {"num_key_value_heads": None}),
    "granite": ("GraniteConfig", {"logits_scaling": 2.0}),
    "cohere": ("CohereConfig", {"logit_scale": 0.25}),
}


@functools.cache
def tiny_target(family: str = "llama", seed: int = 0, layers: int = 2) -> Target:
    """A random target in float32."""
    name, extra = FAMILIES[family]
    shape = {key: value for key, value in {**SHAPE, **extra, "num_hidden_layers": layers}.items() if value is not None}
    if kinds := shape.get("layer_types"):
        shape["layer_types"] = [kinds[layer % len(kinds)] for layer in range(layers)]
    torch.manual_seed(seed)
    config = getattr(transformers, name)(**shape)
    config._attn_implementation = "eager" if family == "gemma2-mixed" else "sdpa"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.generation_config.eos_token_id = SHAPE["eos_token_id"]
    model.generation_config.pad_token_id = 0
    return wrap(model, None)


def tiny_drafter(target: Target, seed: int = 1, **changes: object) -> Drafter:
    """A random drafter of the target's shape."""
    torch.manual_seed(seed)
    return Drafter(DrafterConfig(**drafter_shape(target.model.config) | changes)).requires_grad_(False).eval()


class PlainHead:
    """The full head, in three lines."""

    recordable = False

    def __init__(self, target: Target) -> None:
        self.lent = target.lent

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        logprob_NV = self.lent.logits(hidden_ND).log_softmax(-1)
        return Candidates(logprob_NV, torch.arange(logprob_NV.shape[-1]))


class ScriptHead:
    """Proposes tokens from a script by position in the answer, whatever it is shown: always right, or always wrong."""

    recordable = False

    def __init__(self, proposals: list[list[int]]) -> None:
        self.proposals, self.calls = proposals, 0

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        token_C = torch.tensor(self.proposals[min(self.calls, len(self.proposals) - 1)])
        self.calls += 1
        logprob_NC = torch.linspace(-0.1, -3.0, token_C.numel()).expand(hidden_ND.shape[0], -1)
        return Candidates(logprob_NC, token_C)


def positions(position_BT: torch.Tensor, dtype: torch.dtype) -> CosSin:
    """The `rope` of a drafter that turns nothing: the positions themselves, [B,1,T,1]."""
    return (position_BT[:, None, :, None],) * 2


class StandIn:
    """What decoding asks of a drafter besides its layer, of one in EAGLE-2's shape that turns nothing."""

    config = SimpleNamespace(taps=(), draft_vocab_size=0)
    rope = staticmethod(positions)

    def read(self, feature_BTD: torch.Tensor) -> torch.Tensor:
        return feature_BTD

    def hidden(self, state_BTD: torch.Tensor) -> torch.Tensor:
        return state_BTD


class OracleHead:
    """Knows the answer, and proposes its next token with probability `right`, among wrong ones and anywhere in rank.

    `follow` must be told every event, so that the oracle knows where the answer stands.
    """

    recordable = False

    def __init__(self, answer: list[int], right: float, count: int = 3) -> None:
        self.answer, self.right, self.count = answer, right, count
        self.random = random.Random(0)
        self.start = self.level = 0

    def follow(self, event: Round) -> Round:
        self.start, self.level = self.start + len(event.new_ids), 0
        return event

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        place, self.level = self.start + self.level, self.level + 1
        tokens = self.random.sample(range(3, VOCAB), self.count)
        if place < len(self.answer) and self.random.random() < self.right and self.answer[place] not in tokens:
            tokens[self.random.randrange(self.count)] = self.answer[place]
        logprob_NC = torch.linspace(-0.1, -2.0, self.count).expand(hidden_ND.shape[0], -1)
        return Candidates(logprob_NC, torch.tensor(tokens))


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConfidentShape(TreeShape):
    """A plan of which nodes are left out whose path the drafter believes in less than `confidence`."""

    confidence: float

    @property
    def shape(self) -> None:  # type: ignore[override]
        """The size of a draft depends on scores."""

    def width(self, score_N: torch.Tensor) -> int:
        return int((score_N >= math.log(self.confidence)).sum())

    def count(self, score_N: torch.Tensor) -> int:
        return min(self.nodes, self.width(score_N))


def tiny_engine(target: Target, depth: int = 4, nodes: int = 7, topk: int = 3) -> Engine:
    """An engine with a random drafter and the full head."""
    return Engine(target, tiny_drafter(target), PlainHead(target), TreeShape(depth=depth, nodes=nodes, topk=topk))
