"""The frozen target, as a round calls it: a Hugging Face causal LM, its weights unchanged. How it is loaded is load.py.

Axes: B batch, T position, K cached column, D hidden, X any axes.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch

from coral_core.errors import DataError, TargetError
from coral_core.kernels import exact
from coral_core.kernels.layers import PackedLinear
from coral_core.lent import Lent


@dataclasses.dataclass(frozen=True)
class Target:
    """A frozen causal LM; `forward` gives features, `logits` its own logits from them."""

    model: Any
    tokenizer: Any
    lent: Lent
    fingerprint: str
    """Names the weights, the vocabulary and the chat template: artifacts made for another target are refused by it."""
    stop_ids: frozenset[int]
    max_positions: int
    layer_types: tuple[str, ...]
    """The distinct kinds of attention layer, sorted."""
    window: int
    """Positions that a sliding layer sees, itself included; 0 when no layer slides, or all of the context is seen."""
    bounded: bool = False
    """Whether `max_positions` is less than the model's own: further ones would change the rows before them."""
    exact: bool = False
    """Whether the rows of a forward have the same bits whatever is read with them (kernels/exact.py)."""
    graphs: bool = False
    """Whether decoding records its forwards (decoding/recorded.py)."""
    taps: tuple[int, ...] = ()
    """Layers whose inputs `forward` gives before the features (`tapping`)."""
    idle: list[Any] = dataclasses.field(default_factory=list, repr=False, compare=False)
    """Memories with recordings that no answer is using (decoding/recorded.py)."""

    @classmethod
    def from_pretrained(cls, model: str, **options: Any) -> "Target":
        """`pico`, a Hub id, a folder or a GGUF file. `options` are a recipe's keys: revision, chat_template,
        dtype, device, trust_remote_code, graphs.

        Raises TargetError for what is not there or cannot be sped up.
        """
        from coral_core.recipe.schema import TargetSpec
        from coral_core.target.load import load_target

        return load_target(TargetSpec(model=model, **options))

    @property
    def device(self) -> torch.device:
        """Where the first weights are."""
        return self.lent.embed_VD.device

    @property
    def dtype(self) -> torch.dtype:
        """The weights' dtype."""
        return self.lent.embed_VD.dtype

    @property
    def body(self) -> Any:
        """The part of the model that reads tokens: its layers, without those for images."""
        return self.model.get_decoder()

    @functools.cached_property
    def _width(self) -> int:
        """Of the activations."""
        config = self.model.config.get_text_config()
        named = getattr(config, "intermediate_size", None) or getattr(config, "n_inner", None) or 4 * config.hidden_size
        return int(named[0] if isinstance(named, list | tuple) else named)

    @functools.cached_property
    def _packed(self) -> bool:
        """Whether all weights are packed that layers multiply with. GPT-2's are not: its layers are no nn.Linear."""
        read = [part for part in self.model.base_model.modules() if not isinstance(part, torch.nn.Embedding)]
        matrices = [part for part in read if getattr(part, "weight", None) is not None and part.weight.dim() == 2]
        return all(isinstance(part, PackedLinear) for part in matrices)

    @functools.cached_property
    def _cache_name(self) -> str:
        """The argument for a cache: transformers renames it, model by model, and warns of the old name."""
        model = self.model.base_model
        names = inspect.signature(getattr(model, "forward", model)).parameters
        return "cache" if "cache" in names else "past_key_values"

    def refuse_strange(self, ids: Sequence[int]) -> None:
        """Raises DataError for a token that the embedding has no row for, as one added to the tokenizer alone."""
        rows = self.lent.embed_VD.shape[0]
        strange = next((token for token in ids if not 0 <= token < rows), None)
        if strange is not None:
            name = self.tokenizer.convert_ids_to_tokens(strange) if self.tokenizer and strange >= 0 else None
            raise DataError(
                f"token {strange}{f' ({name})' if name else ''} has no row in the target's embedding, which has "
                f"{rows:,}. Leave it out of the prompt, or resize the model's embedding and save it"
            )

    def forward(
        self,
        ids_BT: torch.Tensor,
        *,
        position_BT: torch.Tensor | None = None,
        mask: torch.Tensor | dict[str, torch.Tensor] | None = None,
        cache: Any = None,
    ) -> torch.Tensor:
        """Features [B,T,D]; with three taps [B,T,4D], the features last. Raises TargetError for taps of another shape,
        or that the model does not give.

        `mask` is additive [B,1,T,K], or one per layer type where the model mixes types. Rows past the context's end,
        drafted nodes that will not be emitted, are read at its last position.
        """
        rows = ids_BT.shape[1]
        recorded = self.graphs or ids_BT.device.type != "cpu"
        padded = isinstance(mask, torch.Tensor) and mask.dim() == 2
        if self.exact and not recorded and position_BT is not None and cache is not None and not padded:
            mask, cache = exact.masks(position_BT, mask, self.layer_types), exact.Filled(cache, rows)
            threads = torch.get_num_threads()
            more = exact.filled_rows(rows, ids_BT.shape[0], self._width, threads, self._packed) - rows
            ids_BT, position_BT = (torch.cat((x, x[:, -1:].expand(-1, more)), 1) for x in (ids_BT, position_BT))
        if position_BT is not None:
            position_BT = position_BT.clamp_max(self.max_positions - 1)
        out = self.model.base_model(
            input_ids=ids_BT,
            position_ids=position_BT,
            attention_mask=mask,
            use_cache=cache is not None,
            output_hidden_states=list(self.taps) or False,  # those of all layers, in an older transformers
            **{self._cache_name: cache},
        )
        if not self.taps:
            return out.last_hidden_state[:, :rows]
        if max(self.taps) >= (layers := len(out.hidden_states) - 1):  # LongCat-Flash counts each layer twice
            raise TargetError(
                f"{type(self.model).__name__} gives the inputs of {layers} layers, and a drafter "
                f"reads that of layer {max(self.taps)} (0 is the first). Set train.preset=drawn train.shape=eagle2"
            )
        taken = [*(out.hidden_states[layer] for layer in self.taps), out.last_hidden_state]
        if strange := [list(state.shape) for state in taken if state.shape != taken[-1].shape]:
            raise TargetError(
                f"layers of {type(self.model).__name__} read states of the shape {strange[0]}, and a drafter reads "
                f"{list(taken[-1].shape)}. Set train.preset=drawn train.shape=eagle2"
            )
        return torch.cat([state_BTD[:, :rows] for state_BTD in taken], dim=-1)

    def mask(self, sees: Callable[[int], torch.Tensor]) -> torch.Tensor | dict[str, torch.Tensor]:
        """The additive mask of what `sees` gives for a window (0: none), [T,K] or [B,T,K], true where a row sees.

        [B,1,T,K] with 0 where it sees and the dtype's lowest number elsewhere; one for each type of layer where there
        are several.
        """
        masks = {}
        for kind in self.layer_types:
            sees_XTK = sees(self.window if kind == "sliding_attention" else 0)
            mask_XTK = torch.zeros(sees_XTK.shape, dtype=self.dtype, device=sees_XTK.device)
            mask_XTK.masked_fill_(~sees_XTK, torch.finfo(self.dtype).min)
            masks[kind] = mask_XTK[None, None] if mask_XTK.dim() == 2 else mask_XTK[:, None]
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def causal_mask(self, past: int, new: int) -> torch.Tensor | dict[str, torch.Tensor] | None:
        """The mask of plain rows appended to a cache; None where the model's own is the same and faster."""
        hides = 0 < self.window < past + new
        if not hides and (past == 0 or new == 1):
            return None
        return self.mask(lambda window: causal(past, new, window, self.device))

    def logits(self, feature_XD: torch.Tensor) -> torch.Tensor:
        """The target's own logits [..., V] of what `forward` gives."""
        return self.lent.logits(feature_XD[..., -self.lent.head_VD.shape[1] :], exact=self.exact)

    def tapping(self, taps: tuple[int, ...]) -> "Target":
        """The same model, giving the inputs of these layers too. Raises TargetError when it has fewer layers."""
        if taps == self.taps:
            return self
        layers = int(self.model.config.get_text_config().num_hidden_layers)
        if taps and max(taps) >= layers:
            raise TargetError(
                f"the drafter reads the input of layer {max(taps)} (0 is the first), and {type(self.model).__name__} "
                f"has {layers}: it was trained for another target. Set target.model to its own"
            )
        return dataclasses.replace(self, taps=taps, idle=[])


def causal(past: int, new: int, window: int, device: torch.device) -> torch.Tensor:
    """[T,K] true where a new row sees a cached or earlier row; a window of 0 is unbounded."""
    row_T1 = torch.arange(past, past + new, device=device)[:, None]
    column_K = torch.arange(past + new, device=device)
    sees_TK = column_K <= row_T1
    return sees_TK & (row_T1 - column_K < window) if window else sees_TK
