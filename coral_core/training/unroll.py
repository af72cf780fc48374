"""The multi-step unroll (HASS's harmonised context): step F sees what the F-th drafted token sees when decoding.

Row r reads token r+1 and a state of position r, and predicts what the target's head reads at r+1, in every step. Step 1
reads what the target gave (its features or its taps); after step j the output, moved down one row, is stream j. It is
detached, or gradients run through all steps, as EAGLE-3 trains. `attention` says what a row sees of the streams. Not
for decoding: nothing here is cached between calls.

Axes: B batch, T position (the last has no next token, and no row), D hidden, H attention head, J key/value head, E head
dimension, N row that is read, Q query: a row whose output is asked for, I input width of what the target gave, X any
axes.
"""

from collections.abc import Sequence

import torch
from torch import nn

from coral_core.drafter.model import Drafter
from coral_core.lent import Lent
from coral_core.store.batches import Batch
from coral_core.training.attention import StreamAttention, attend_fast
from coral_core.training.rows import computing_dtype, missing_rows


def loss_rows(batch: Batch) -> torch.Tensor:
    """[B,T] bool: the rows that carry a loss, those whose output drafts a token of an answer.

    Row r's output is feature r+1, which the head turns into token r+2: so token r+2 must be an answer's, its stop token
    included. Token r+1 must be one too, since the target itself picks the first token of an answer (from the prompt's
    last feature) and drafting starts after it. Rows further in, up to the one that drafts the stop token, are all
    trained; the row after it would draft what follows an answer, which nobody asks for.
    """
    rows_BT = torch.zeros_like(batch.answer_BT[:, 1:])
    rows_BT[:, :-1] = batch.answer_BT[:, 1:-1] & batch.answer_BT[:, 2:]
    return rows_BT


def unroll_rows(
    drafter: Drafter,
    inputs: tuple[torch.Tensor, torch.Tensor],
    rows: Sequence[torch.Tensor],
    attention: StreamAttention = attend_fast,
    *,
    read_BT: torch.Tensor | None = None,
    through: bool = False,
) -> list[torch.Tensor]:
    """Outputs [B,T,D] of as many steps as `rows` has masks [B,T]; a step runs on its mask's rows, elsewhere it gives 0.

    `inputs` are the embeddings of tokens r+1 and the first states r, both [B,T,D]. The rows `read_BT` give keys and
    values in the first step, which every later row sees; by default those whose output is wanted there. The drafter's
    matrices see the masked rows of all sequences side by side, without padding; only attention is laid out by sequence.
    Gradients reach the key and value projections of every stream, and the stream itself only with `through`. An output
    is what the LM head reads.
    """
    embed_BTD, first_BTD = inputs
    shape, keys, values = embed_BTD.shape[:2], [], []
    outputs: list[torch.Tensor] = []
    stream_BTD, dtype = first_BTD, computing_dtype(first_BTD)
    for mask_BT in rows:
        row_N = (mask_BT if outputs or read_BT is None else read_BT).flatten().nonzero()[:, 0]
        place_Q = mask_BT.flatten()[row_N].nonzero()[:, 0]
        filled_N, filled_Q = (_filled(index, first_BTD.device, dtype) for index in (row_N, place_Q))
        every = len(place_Q) == len(row_N)

        def attend(
            query_1HQE: torch.Tensor,
            key_1JNE: torch.Tensor,
            value_1JNE: torch.Tensor,
            row_N: torch.Tensor = row_N,
            asked_Q: torch.Tensor = row_N[place_Q],
            filled_Q: torch.Tensor = row_N[filled_Q],
        ) -> torch.Tensor:
            repeats = query_1HQE.shape[1] // key_1JNE.shape[1]
            keys.append(_by_sequence(key_1JNE, row_N, shape).repeat_interleave(repeats, dim=1))
            values.append(_by_sequence(value_1JNE, row_N, shape).repeat_interleave(repeats, dim=1))
            out_BHTE = attention(_by_sequence(query_1HQE, asked_Q, shape), keys, values)
            return out_BHTE.transpose(1, 2).flatten(0, 1)[filled_Q].transpose(0, 1)[None]

        embed_1ND, stream_1ND = (x_BTD.flatten(0, 1)[filled_N][None] for x_BTD in (embed_BTD, stream_BTD))
        cos_sin = drafter.rope((filled_N % shape[1])[None], dtype)
        out_1QD = drafter(embed_1ND, stream_1ND, cos_sin, attend, None if every else filled_Q)
        out_BTD = _scatter(out_1QD[0], row_N[place_Q], shape)
        outputs.append(drafter.hidden(out_BTD))
        fed_BTD = out_BTD if through else out_BTD.detach()
        stream_BTD = torch.cat((first_BTD[:, :1].to(fed_BTD.dtype), fed_BTD[:, :-1]), dim=1)
    return outputs


def _filled(index: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The index with more entries at its end, for a product of as many rows as the device multiplies well."""
    return torch.nn.functional.pad(index, (0, missing_rows(len(index), device, dtype)))


def _by_sequence(x_1HNE: torch.Tensor, row_N: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[B,H,T,E] from the rows side by side; 0 where there is none."""
    return _scatter(x_1HNE[0].transpose(0, 1), row_N, shape).transpose(1, 2)


def _scatter(x_NX: torch.Tensor, row_N: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[B,T,...] with the first of x at the flat rows `row_N`, and 0 elsewhere."""
    whole = x_NX.new_zeros(shape.numel(), *x_NX.shape[1:])
    return whole.index_copy(0, row_N, x_NX[: len(row_N)]).unflatten(0, shape)


def needed_rows(valid_BT: torch.Tensor, wanted_BT: torch.Tensor | None, steps: int) -> list[torch.Tensor]:
    """One mask [B,T] per step: the rows to compute so that every step's wanted rows are right.

    A wanted row r of step F attends rows r-1, r-2, … of streams F-2, F-3, …, and reads row r-1's output of the step
    before: so a step needs its wanted rows and the steps - F rows before each. Prompts are long and carry no loss; all
    that is computed of their rows is what the first step's keys and values are made of.
    """
    if wanted_BT is None:
        return [valid_BT] * steps
    needed = [wanted_BT]
    for _ in range(steps - 1):
        earlier_BT = torch.nn.functional.pad(needed[0][:, 1:], (0, 1))
        needed.insert(0, wanted_BT | (earlier_BT & valid_BT))
    return needed


def unroll(
    drafter: Drafter,
    lent: Lent,
    batch: Batch,
    steps: int,
    *,
    wanted_BT: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Outputs [B,T,D] of each step for a batch: row r of every step predicts feature r+1; rows of padding are 0.

    With `wanted_BT`, only these rows of the outputs mean anything, and the later steps compute no more than they need.
    """
    valid_BT = batch.valid_BT[:, 1:]
    rows = needed_rows(valid_BT, wanted_BT, steps)
    return unroll_rows(drafter, _inputs(drafter, lent, batch, None), rows, read_BT=valid_BT)


def _inputs(
    drafter: Drafter, lent: Lent, batch: Batch, noise_BTI: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and first states [B,T,D]; the noise is added to what the drafter reads of the target."""
    embed_BTD, read_BTI = lent.embed(batch.ids_BT[:, 1:]), batch.read_by(taps=bool(drafter.config.taps))[:, :-1]
    if noise_BTI is not None:
        read_BTI = read_BTI + noise_BTI
    return embed_BTD.to(read_BTI.dtype), drafter.read(read_BTI)


def feature_noise(batch: Batch, width: float, generator: torch.Generator, *, taps: bool = False) -> torch.Tensor:
    """Uniform noise [B,T,I] within ± width/2 · 512 over the sequence's own length: padding does not change it."""
    length_B11 = batch.valid_BT.sum(-1).clamp(min=1)[:, None, None]
    shape = batch.read_by(taps=taps)[:, :-1].shape
    uniform_BTI = torch.rand(shape, generator=generator, device=batch.feature_BTD.device) - 0.5
    return uniform_BTI * (width * 512 / length_B11)


class Unroll(nn.Module):
    """The whole unroll of the rows that carry a loss as one forward pass: DDP and FSDP see each weight in one call."""

    def __init__(self, drafter: Drafter, steps: int, *, through: bool = False) -> None:
        super().__init__()
        self.drafter = drafter
        self.steps = steps
        self.through = through

    def forward(
        self, lent: Lent, batch: Batch, noise_BTI: torch.Tensor | None = None, steps: int | None = None
    ) -> list[torch.Tensor]:
        """Outputs of the first `steps` steps, all of them by default."""
        valid_BT = batch.valid_BT[:, 1:]
        rows = needed_rows(valid_BT, loss_rows(batch), steps or self.steps)
        inputs = _inputs(self.drafter, lent, batch, noise_BTI)
        return unroll_rows(self.drafter, inputs, rows, read_BT=valid_BT, through=self.through)
