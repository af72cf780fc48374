"""The best tokens of the active groups in one pass over their rows: Triton on a GPU, plain PyTorch as the reference.

Nothing here waits for the device: which groups are active stays on it. The kernel is tested in Triton's interpreter
against the reference; it has not been run on a GPU yet.
Axes: N row, D hidden, V vocabulary in permuted order, G group, R place in a list of active groups, C candidate.
"""

import dataclasses
import importlib.util

import torch

from coral_core.lent import Lent

BEST = 16
"""Candidates that the kernel keeps of each tile of rows: no tree proposes more per node."""
MAX_ROWS = 64
"""Rows of one call that the kernel holds at once."""


@dataclasses.dataclass(frozen=True)
class Best:
    """The logits of the most likely of the active rows; not sorted, and -inf where a tile had fewer."""

    logit_NC: torch.Tensor
    row_NC: torch.Tensor


def fits(lent: Lent, rows_VD: torch.Tensor) -> bool:
    """Whether the kernel serves this head: on a GPU with Triton, and logits that are plain products."""
    plain = lent.logit_scale == 1.0 and not lent.logit_softcap and rows_VD.shape[1] % 64 == 0
    return plain and rows_VD.is_cuda and importlib.util.find_spec("triton") is not None


def grouped_best(
    hidden_ND: torch.Tensor,
    rows_VD: torch.Tensor,
    start_G: torch.Tensor,
    chosen_NR: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> Best:
    """The best candidates among the rows of the chosen groups; group g is rows start_G[g] to start_G[g + 1].

    `chosen_NR` is [1,R] where all rows share their groups.
    """
    from coral_core.kernels.triton_blocks import launch

    parts = [slice(first, first + MAX_ROWS) for first in range(0, hidden_ND.shape[0], MAX_ROWS)]
    own = chosen_NR.shape[0] > 1
    found = [launch(hidden_ND[n], rows_VD, start_G, chosen_NR[n] if own else chosen_NR, bias_V) for n in parts]
    if len(found) == 1:
        return Best(*found[0])
    return Best(*(torch.cat(pieces) for pieces in zip(*found, strict=True)))


def grouped_best_reference(
    hidden_ND: torch.Tensor,
    rows_VD: torch.Tensor,
    start_G: torch.Tensor,
    chosen_NR: torch.Tensor,
    bias_V: torch.Tensor | None = None,
) -> Best:
    """The same, row by row, all candidates kept."""
    start, logits, rows = start_G.tolist(), [], []
    for n, hidden_D in enumerate(hidden_ND):
        chosen_R = chosen_NR[n if chosen_NR.shape[0] > 1 else 0]
        row_C = torch.cat([torch.arange(start[g], start[g + 1], device=rows_VD.device) for g in chosen_R.tolist()])
        bias_C = 0 if bias_V is None else bias_V[row_C]
        logits.append(rows_VD[row_C].float() @ hidden_D.float() + bias_C)
        rows.append(row_C)
    pad = torch.nn.utils.rnn.pad_sequence
    return Best(pad(logits, batch_first=True, padding_value=-torch.inf), pad(rows, batch_first=True))
