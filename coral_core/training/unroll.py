"""The multi-step unroll (HASS's harmonised context): step F sees what the F-th drafted token sees when decoding.

Row r reads token r+1 and a feature of position r, and predicts the target's feature r+1, in every step. Step 1 reads
the target's features; after step j the output, moved down one row and detached, is stream j. `attention` says what a
row sees of the streams. Not for decoding: nothing here is cached between calls.

Axes: B batch, T position, R row = T-1 (the last position has no next token), D hidden, H head, G key/value head.
"""

import torch
from torch import nn

from coral_core.drafter.model import Drafter
from coral_core.lent import Lent
from coral_core.store.batches import Batch
from coral_core.training.attention import StreamAttention, attend_fast


def loss_rows(batch: Batch) -> torch.Tensor:
    """[B,R] bool: the rows that carry a loss, those whose output drafts a token of an answer.

    Row r's output is feature r+1, which the head turns into token r+2: so token r+2 must be an answer's, its stop token
    included. Token r+1 must be one too, since the target itself picks the first token of an answer (from the prompt's
    last feature) and drafting starts after it. Rows further in, up to the one that drafts the stop token, are all
    trained; the row after it would draft what follows an answer, which nobody asks for.
    """
    rows_BR = torch.zeros_like(batch.answer_BT[:, 1:])
    rows_BR[:, :-1] = batch.answer_BT[:, 1:-1] & batch.answer_BT[:, 2:]
    return rows_BR


def unroll_rows(
    drafter: nn.Module,
    embed_BRD: torch.Tensor,
    feature_BRD: torch.Tensor,
    steps: int,
    attention: StreamAttention = attend_fast,
) -> list[torch.Tensor]:
    """Outputs [B,R,D] of steps 1 to `steps`, from the embeddings of tokens r+1 and the target's features r.

    Rows right of a sequence's end hold padding; causal offsets keep them out of every real row. Gradients reach the
    key and value projections of every stream, not the stream itself.
    """
    position_BR = torch.arange(embed_BRD.shape[1], device=embed_BRD.device)[None]
    keys: list[torch.Tensor] = []
    values: list[torch.Tensor] = []

    def attend(query_BHRE: torch.Tensor, key_BGRE: torch.Tensor, value_BGRE: torch.Tensor) -> torch.Tensor:
        repeats = query_BHRE.shape[1] // key_BGRE.shape[1]
        keys.append(key_BGRE.repeat_interleave(repeats, dim=1))
        values.append(value_BGRE.repeat_interleave(repeats, dim=1))
        return attention(query_BHRE, keys, values)

    outputs: list[torch.Tensor] = []
    stream_BRD = feature_BRD
    for _ in range(steps):
        out_BRD = drafter(embed_BRD, stream_BRD, position_BR, attend)
        outputs.append(out_BRD)
        stream_BRD = torch.cat((feature_BRD[:, :1], out_BRD[:, :-1].detach()), dim=1)
    return outputs


def unroll(
    drafter: Drafter, lent: Lent, batch: Batch, steps: int, noise_BRD: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """Outputs [B,R,D] of each step for a batch: row r of every step predicts feature r+1.

    `noise_BRD` is added to the target's features that the drafter reads.
    """
    embed_BRD, feature_BRD = lent.embed(batch.ids_BT[:, 1:]), batch.feature_BTD[:, :-1]
    if noise_BRD is not None:
        feature_BRD = feature_BRD + noise_BRD
    return unroll_rows(drafter, embed_BRD.to(feature_BRD.dtype), feature_BRD, steps)


def feature_noise(batch: Batch, width: float, generator: torch.Generator) -> torch.Tensor:
    """Uniform noise [B,R,D] within ± width/2 · 512 / T, T the sequence's own length: padding does not change it."""
    length_B11 = batch.valid_BT.sum(-1).clamp(min=1)[:, None, None]
    shape = batch.feature_BTD[:, :-1].shape
    uniform_BRD = torch.rand(shape, generator=generator, device=batch.feature_BTD.device) - 0.5
    return uniform_BRD * (width * 512 / length_B11)


class Unroll(nn.Module):
    """The whole unroll as one forward pass, so that DDP and FSDP see each weight used within one call."""

    def __init__(self, drafter: Drafter, steps: int) -> None:
        super().__init__()
        self.drafter = drafter
        self.steps = steps

    def forward(self, lent: Lent, batch: Batch, noise_BRD: torch.Tensor | None = None) -> list[torch.Tensor]:
        return unroll(self.drafter, lent, batch, self.steps, noise_BRD)
