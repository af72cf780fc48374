"""Growing the drafts of several answers, a level at a time: one drafter pass and one head for all of them.

Each answer has a beam and a tree of its own, made by the index code for one (tree.py); only the networks see a batch.
Axes: B seat, W beam node of the widest beam, N beam nodes of all seats, T new row, D hidden, K cached column.
"""

import torch
from torch.nn.utils.rnn import pad_sequence

from coral_core.decoding import masks, tree
from coral_core.decoding.batch.cache import SeatSlots
from coral_core.decoding.drafting import Drafting, TreeShape
from coral_core.decoding.sampling import Picker
from coral_core.drafter.model import Drafter
from coral_core.head.candidates import Candidates, Head
from coral_core.kernels.attention import grouped
from coral_core.lent import Lent


class BatchDrafting:
    """The drafter, its head and its cache, for a batch of answers. `past` holds each seat's committed rows."""

    def __init__(self, drafter: Drafter, lent: Lent, head: Head, shape: TreeShape, seats: int, capacity: int) -> None:
        self.drafter, self.lent, self.head, self.shape = drafter, lent, head, shape
        # Behind the committed rows stand a growing draft or an accepted path, filled up to the batch's widest.
        self.slots = SeatSlots(seats, capacity + shape.rows + shape.topk + shape.depth + 1)

    def alone(self, seat: int) -> Drafting:
        """The drafting of one answer in an empty seat, for its prompt."""
        return Drafting(self.drafter, self.lent, self.head, self.shape, self.slots.seat(seat))

    def feed(self, token_BT: torch.Tensor, feature_BTD: torch.Tensor, past: list[int]) -> torch.Tensor:
        """Append committed rows (token t+1, feature t), padded on the right; the drafted feature [B,T,D] after each."""
        past_B1 = torch.tensor(past, device=token_BT.device)[:, None]
        column_BT = past_B1 + torch.arange(token_BT.shape[1], device=token_BT.device)
        end = max(past) + token_BT.shape[1]
        sees_BTK = torch.arange(end, device=token_BT.device) <= column_BT[:, :, None]
        return self._forward(token_BT, self.drafter.read(feature_BTD), column_BT, column_BT, sees_BTK)

    def grow(self, roots: list[int], hidden_BD: torch.Tensor, past: list[int], picker: Picker) -> list[tree.Draft]:
        """Draft a tree below each root, from the drafted feature that follows it."""
        topk = self.shape.topk
        position = [rows + 1 for rows in past]
        logprob_BC, token_BC = self._propose(hidden_BD, picker, [1] * len(past), position)
        columns = max(past) + self.shape.rows
        seen = [masks.committed(rows, columns, hidden_BD) for rows in past]
        proposed = zip(logprob_BC, token_BC, seen, strict=True)
        beams = [self._narrow(tree.plant(logprob_C, token_C, topk, sees_K)) for logprob_C, token_C, sees_K in proposed]
        firsts, starts, hidden_ND = past, list(range(len(beams))), hidden_BD
        for level in range(1, self.shape.depth):
            widths = [beam.token_N.numel() for beam in beams]
            if not any(widths):
                break
            feature_ND = torch.cat([hidden_ND[start + beam.row_N] for start, beam in zip(starts, beams, strict=True)])
            for first, width, beam in zip(firsts, widths, beams, strict=True):
                tree.settle(beam, torch.arange(first, first + width, device=hidden_BD.device))
            hidden_ND = self._level(beams, feature_ND, firsts, [rows - 1 + level for rows in past])
            position = [rows + 1 for rows in position]
            logprob_NC, token_NC = self._propose(hidden_ND, picker, widths, position)
            proposals = zip(beams, logprob_NC.split(widths), token_NC.split(widths), strict=True)
            starts = [sum(widths[:seat]) for seat in range(len(widths))]
            beams = [
                self._narrow(tree.extend(beam, logprob_WC, token_WC, topk)) if len(token_WC) else beam
                for beam, logprob_WC, token_WC in proposals
            ]
            firsts = [first + width for first, width in zip(firsts, widths, strict=True)]
        return [
            tree.rerank(beam, beam.token_N.new_full((1,), root), self.shape.count)
            for beam, root in zip(beams, roots, strict=True)
        ]

    def _narrow(self, beam: tree.Beam) -> tree.Beam:
        return tree.narrow(beam, self.shape.width(beam.score_N))

    def _propose(
        self, hidden_ND: torch.Tensor, picker: Picker, widths: list[int], position: list[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """`Drafting.propose` for several seats, each with its number of rows and the position that is proposed for."""
        found, vocab = self.head.candidates(self.drafter.hidden(hidden_ND)), self.lent.head_VD.shape[0]
        token_NC = found.token_C if found.token_C.dim() == 2 else found.token_C.expand_as(found.logit_NC)
        aheads = [picker.ahead(place, 1, vocab, token_NC.device) for place in position]
        parts = zip(aheads, found.logit_NC.split(widths), token_NC.split(widths), strict=True)
        logprob_NC = torch.cat([ahead.rank(0, logit, token) for ahead, logit, token in parts])
        return Candidates(logprob_NC, found.token_C).best(self.shape.topk)

    def _level(
        self, beams: list[tree.Beam], feature_ND: torch.Tensor, firsts: list[int], position: list[int]
    ) -> torch.Tensor:
        """The drafted features [N,D] of all beams' nodes: for each seat, its first column and its nodes' position."""
        device, widths = feature_ND.device, [beam.token_N.numel() for beam in beams]
        valid_BW = torch.arange(max(widths), device=device) < torch.tensor(widths, device=device)[:, None]
        token_BW = torch.zeros(valid_BW.shape, dtype=torch.long, device=device)
        token_BW[valid_BW] = torch.cat([beam.token_N for beam in beams])
        feature_BWD = feature_ND.new_zeros(*valid_BW.shape, feature_ND.shape[1])
        feature_BWD[valid_BW] = feature_ND
        column_BW = torch.tensor(firsts, device=device)[:, None] + torch.arange(max(widths), device=device)
        sees_BWK = pad_sequence([beam.sees_NK for beam in beams], batch_first=True)[:, :, : max(firsts) + max(widths)]
        position_B1 = torch.tensor(position, device=device)[:, None]
        return self._forward(token_BW, feature_BWD, position_B1, column_BW, sees_BWK)[valid_BW]

    def _forward(
        self,
        token_BT: torch.Tensor,
        feature_BTD: torch.Tensor,
        position_BT: torch.Tensor,
        column_BT: torch.Tensor,
        sees_BTK: torch.Tensor,
    ) -> torch.Tensor:
        self.slots.place(column_BT, sees_BTK.shape[-1])

        def attend(query_BHTE: torch.Tensor, key_BGTE: torch.Tensor, value_BGTE: torch.Tensor) -> torch.Tensor:
            key_BGKE, value_BGKE = self.slots.update(key_BGTE, value_BGTE)
            return grouped(query_BHTE, key_BGKE, value_BGKE, sees_BTK[:, None])

        turn = self.drafter.rope(position_BT, feature_BTD.dtype)
        return self.drafter(self.lent.embed(token_BT), feature_BTD, turn, attend)
