"""The drafter's shape: what its config.json says, in the words of a Llama config."""

import dataclasses
import json
from pathlib import Path
from typing import Any

from coral_core.errors import ArtifactError


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrafterConfig:
    """One decoder layer of the target's own shape; the keys are those of a Hugging Face Llama config."""

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

    def save(self, folder: Path) -> None:
        """Write config.json; `model_type` lets Hugging Face tools recognise the layout."""
        values = {"model_type": "coral-drafter", "num_hidden_layers": 1, **dataclasses.asdict(self)}
        (folder / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "DrafterConfig":
        """Read config.json. Raises ArtifactError when a key is missing or the file is not a drafter's."""
        path = folder / "config.json"
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise ArtifactError(f"no drafter in {folder}: {error}. Run: coral train") from error
        fields = dataclasses.fields(cls)
        missing = [field.name for field in fields if field.name not in values and field.default is dataclasses.MISSING]
        if missing:
            raise ArtifactError(f"{path} is not a drafter's config: key '{missing[0]}' is missing. Run: coral train")
        return cls(**{field.name: values[field.name] for field in fields if field.name in values})
