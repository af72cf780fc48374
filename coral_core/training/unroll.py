"""The multi-step unroll (HASS's harmonised context): step F sees what the F-th drafted token sees when decoding.

Row r reads token r+1 and a state of position r, and predicts what the target's head reads at r+1, in every step. Step 1
reads what the target gave (its features or its taps); after step j the output, moved down one row, is stream j. It is
detached, or gradients run through all steps, as EAGLE-3 trains. `attention` says what a row sees of the streams. Not
for decoding: nothing here is cached between calls.

Axes: B batch, T position, R row = T-1 (the last position has no next token), D hidden, H head, G key/value head,
N row that is computed, P the same filled up to whole multiples, X width of what the target gave.
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
    drafter: Drafter,
    inputs: tuple[torch.Tensor, torch.Tensor],
    rows: Sequence[torch.Tensor],
    attention: StreamAttention = attend_fast,
    *,
    through: bool = False,
) -> list[torch.Tensor]:
    """Outputs [B,R,D] of as many steps as `rows` has masks [B,R]; a step runs on its mask's rows, elsewhere it gives 0.

    `inputs` are the embeddings of tokens r+1 and the first states r, both [B,R,D]. The drafter's matrices see the
    masked rows of all sequences side by side, without padding; only attention is laid out by sequence. Gradients reach
    the key and value projections of every stream, and the stream itself only with `through`. An output is what the LM
    head reads.
    """
    embed_BRD, first_BRD = inputs
    shape, keys, values = embed_BRD.shape[:2], [], []
    outputs: list[torch.Tensor] = []
    stream_BRD = first_BRD
    for mask_BR in rows:
        row_N = mask_BR.flatten().nonzero()[:, 0]
        dtype = computing_dtype(first_BRD)
        missing = missing_rows(len(row_N), first_BRD.device, dtype)
        row_P = torch.nn.functional.pad(row_N, (0, missing))

        def attend(
            query_1HPE: torch.Tensor,
            key_1GPE: torch.Tensor,
            value_1GPE: torch.Tensor,
            row_N: torch.Tensor = row_N,
            row_P: torch.Tensor = row_P,
        ) -> torch.Tensor:
            repeats = query_1HPE.shape[1] // key_1GPE.shape[1]
            keys.append(_by_sequence(key_1GPE, row_N, shape).repeat_interleave(repeats, dim=1))
            values.append(_by_sequence(value_1GPE, row_N, shape).repeat_interleave(repeats, dim=1))
            out_BHRE = attention(_by_sequence(query_1HPE, row_N, shape), keys, values)
            return out_BHRE.transpose(1, 2).flatten(0, 1)[row_P].transpose(0, 1)[None]

        embed_1PD, stream_1PD = (x_BRD.flatten(0, 1)[row_P][None] for x_BRD in (embed_BRD, stream_BRD))
        turn = drafter.rope((row_P % shape[1])[None], dtype)
        out_1PD = drafter(embed_1PD, stream_1PD, turn, attend)
        out_BRD = _scatter(out_1PD[0], row_N, shape)
        outputs.append(drafter.hidden(out_BRD))
        fed_BRD = out_BRD if through else out_BRD.detach()
        stream_BRD = torch.cat((first_BRD[:, :1].to(fed_BRD.dtype), fed_BRD[:, :-1]), dim=1)
    return outputs


def _by_sequence(x_1HPE: torch.Tensor, row_N: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[B,H,R,E] from the rows side by side; 0 where there is none."""
    return _scatter(x_1HPE[0].transpose(0, 1), row_N, shape).transpose(1, 2)


def _scatter(x_PX: torch.Tensor, row_N: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """[B,R,...] with the first of x at the flat rows `row_N`, and 0 elsewhere."""
    whole = x_PX.new_zeros(shape.numel(), *x_PX.shape[1:])
    return whole.index_copy(0, row_N, x_PX[: len(row_N)]).unflatten(0, shape)


def needed_rows(valid_BR: torch.Tensor, wanted_BR: torch.Tensor | None, steps: int) -> list[torch.Tensor]:
    """One mask [B,R] per step: the rows to compute so that every step's wanted rows are right.

    Step 1 is stream 0's keys for everyone: all valid rows. A wanted row r of step F attends rows r-1, r-2, … of streams
    F-2, F-3, …, and reads row r-1's output of the step before: so a later step needs its wanted rows and the
    steps - F rows before each. Prompts are long and carry no loss; here they are computed once, not `steps` times.
    """
    if wanted_BR is None:
        return [valid_BR] * steps
    needed = [wanted_BR]
    for _ in range(steps - 2):
        earlier_BR = torch.nn.functional.pad(needed[0][:, 1:], (0, 1))
        needed.insert(0, wanted_BR | (earlier_BR & valid_BR))
    return [valid_BR, *needed][:steps]


def unroll(
    drafter: Drafter,
    lent: Lent,
    batch: Batch,
    steps: int,
    *,
    wanted_BR: torch.Tensor | None = None,
) -> list[torch.Tensor]:
    """Outputs [B,R,D] of each step for a batch: row r of every step predicts feature r+1; rows of padding are 0.

    With `wanted_BR`, only these rows of the outputs mean anything, and the later steps compute no more than they need.
    """
    rows = needed_rows(batch.valid_BT[:, 1:], wanted_BR, steps)
    return unroll_rows(drafter, _inputs(drafter, lent, batch, None), rows)


def _inputs(
    drafter: Drafter, lent: Lent, batch: Batch, noise_BRX: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings and first states [B,R,D]; the noise is added to what the drafter reads of the target."""
    embed_BRD, read_BRX = lent.embed(batch.ids_BT[:, 1:]), batch.read_by(taps=bool(drafter.config.taps))[:, :-1]
    if noise_BRX is not None:
        read_BRX = read_BRX + noise_BRX
    return embed_BRD.to(read_BRX.dtype), drafter.read(read_BRX)


def feature_noise(batch: Batch, width: float, generator: torch.Generator, *, taps: bool = False) -> torch.Tensor:
    """Uniform noise [B,R,X] within ± width/2 · 512 / T, T the sequence's own length: padding does not change it."""
    length_B11 = batch.valid_BT.sum(-1).clamp(min=1)[:, None, None]
    shape = batch.read_by(taps=taps)[:, :-1].shape
    uniform_BRX = torch.rand(shape, generator=generator, device=batch.feature_BTD.device) - 0.5
    return uniform_BRX * (width * 512 / length_B11)


class Unroll(nn.Module):
    """The whole unroll of the rows that carry a loss as one forward pass: DDP and FSDP see each weight in one call."""

    def __init__(self, drafter: Drafter, steps: int, *, through: bool = False) -> None:
        super().__init__()
        self.drafter = drafter
        self.steps = steps
        self.through = through

    def forward(
        self, lent: Lent, batch: Batch, noise_BRX: torch.Tensor | None = None, steps: int | None = None
    ) -> list[torch.Tensor]:
        """Outputs of the first `steps` steps, all of them by default."""
        rows = needed_rows(batch.valid_BT[:, 1:], loss_rows(batch), steps or self.steps)
        inputs = _inputs(self.drafter, lent, batch, noise_BRX)
        return unroll_rows(self.drafter, inputs, rows, through=self.through)
