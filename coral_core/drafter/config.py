"""The drafter's shape: what its config.json says, in the words of a Llama config.

Axes: V vocabulary, D hidden.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from coral_core.errors import ArtifactError, first_line

COMMAND = "coral train; of a drafter that was imported: coral import"
"""What makes a drafter."""
REQUIRED = dataclasses.MISSING


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """One decoder layer of the target's own shape; the keys are a Hugging Face Llama config's, and coral's own."""

    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    fc_bias: bool = False
    """Whether `fc` has a bias: never in what coral trains, often in EAGLE's own checkpoints."""
    taps: tuple[int, ...] = ()
    """EAGLE-3's shape: the target's layers (0 is the first) whose inputs the drafter reads. Empty: EAGLE-2's shape,
    which reads the target's last hidden state."""
    norm_before_residual: bool = False
    """EAGLE-3's shape: whether the layer's residual is the normed state; some checkpoints of speculators have it so."""
    norm_output: bool = False
    """EAGLE-3.1: the normed output is fed back; otherwise the raw one is, and only the head reads it normed."""
    fc_norm: bool = False
    """EAGLE-3.1: each tap goes through a norm of its own before `fc`."""
    draft_vocab_size: int = 0
    """EAGLE-3's shape: rows of an LM head of the drafter's own; 0: the target lends its own, whole."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "taps", tuple(self.taps))  # JSON has lists

    def to_json(self) -> dict[str, Any]:
        """Every field, as JSON reads it back."""
        return {**dataclasses.asdict(self), "taps": list(self.taps)}

    def save(self, folder: Path) -> None:
        """Write config.json; `model_type` lets Hugging Face tools recognise the layout."""
        values = {"model_type": "coral-drafter", "num_hidden_layers": 1, **self.to_json()}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path, mend: str) -> "DrafterConfig":
        """Read config.json.

        Raises ArtifactError, which ends in `mend`, when a key is missing or senseless, or the file is not a drafter's.
        """
        values = read_values(folder, mend)
        fields = dataclasses.fields(cls)
        missing = [field.name for field in fields if field.name not in values and field.default is REQUIRED]
        if missing:
            path = folder / "config.json"
            raise ArtifactError(f"{path} is not a drafter's config: key '{missing[0]}' is missing. {mend}")
        config = cls(**{field.name: values[field.name] for field in fields if field.name in values})
        config.refuse_nonsense(folder, mend)
        return config

    def refuse_nonsense(self, folder: Path, remedy: str) -> None:
        """Raises ArtifactError, naming the key and its value, when no drafter can be built from these values."""
        wrong = self._wrong_size() or self._wrong_rope()
        if wrong:
            raise ArtifactError(f"{folder / 'config.json'}: {wrong}. {remedy}")

    def _wrong_size(self) -> str:
        sizes = [field.name for field in dataclasses.fields(self) if field.type is int and field.default is REQUIRED]
        for key in sizes:
            if type(value := getattr(self, key)) is not int or value < 1:
                return f"{key} is {value!r}; it must be a whole number above 0"
        if self.num_attention_heads % self.num_key_value_heads:
            return f"num_key_value_heads is {self.num_key_value_heads}; {self.num_attention_heads} heads share none"
        if type(self.rms_norm_eps) is not float or not self.rms_norm_eps >= 0:
            return f"rms_norm_eps is {self.rms_norm_eps!r}; it must be a number from 0 up"
        if any(type(tap) is not int or tap < 0 for tap in self.taps) or len(set(self.taps)) < len(self.taps):
            return f"taps is {list(self.taps)}; they must be different layers of the target, counted from 0"
        if type(rows := self.draft_vocab_size) is not int or not 0 <= rows <= self.vocab_size:
            return f"draft_vocab_size is {rows!r}; it must be from 0 to vocab_size ({self.vocab_size})"
        return ""

    def _wrong_rope(self) -> str:
        """What transformers cannot compute, or would compute from a default in place of what is missing."""
        from huggingface_hub.errors import StrictDataclassError
        from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

        rope = self.rope_parameters
        theta = rope.get("rope_theta") if isinstance(rope, dict) else None
        if type(theta) not in (int, float) or not theta > 0:  # type: ignore[operator]  # a number, by now
            return f"rope_parameters is {rope}; its rope_theta must be a number above 0"
        try:
            LlamaRotaryEmbedding(self.rotary())
        except (KeyError, RuntimeError, TypeError, ValueError, StrictDataclassError) as error:
            return f"rope_parameters is {rope}, which transformers refuses ({first_line(error)})"
        return ""

    def rotary(self) -> Any:
        """A Llama config for the rotary embedding. Its hidden size is that of the heads together: transformers refuses
        one that the heads do not divide, and there are such targets (Seed-OSS, GLM-4.5)."""
        from transformers import LlamaConfig

        return LlamaConfig(**dataclasses.asdict(self) | {"hidden_size": self.num_attention_heads * self.head_dim})

    def misfit(self, shape_VD: tuple[int, ...]) -> str:
        """Why a drafter of this shape cannot read a target with an embedding of that one; '' when it can."""
        vocabulary, hidden = shape_VD
        if (self.vocab_size, self.hidden_size) == (vocabulary, hidden):
            return ""
        own = f"a vocabulary of {self.vocab_size} and {self.hidden_size} hidden"
        return f"is for {own}; the target has {vocabulary} and {hidden}"


def read_values(folder: Path, remedy: str) -> dict[str, Any]:
    """The object in config.json. Raises ArtifactError, with the remedy, when there is none."""
    path = folder / "config.json"
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"no drafter in {folder}: it has no config.json. {remedy}") from error
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path} is not readable as JSON: {error}. {remedy}") from error
    if not isinstance(values, dict):
        raise ArtifactError(f"{path} is not a config: it is no JSON object. {remedy}")
    return values
