"""The tokens so far of one answer, for samplers that look back.

Axes: T position, M tree row, L token of a row's own past.
"""

import torch

from coral_core.decoding.tree import Draft


class History:
    """Prompt and answer on the device, appended to in place."""

    def __init__(self, prompt_T: torch.Tensor, capacity: int) -> None:
        self._token_T = prompt_T.new_empty(capacity)
        self._length = 0
        self.extend(prompt_T)

    def extend(self, token_T: torch.Tensor) -> None:
        """Append committed tokens."""
        end = self._length + token_T.numel()
        self._token_T[self._length : end] = token_T
        self._length = end

    def row(self) -> torch.Tensor:
        """[1,L]: the past of the next token."""
        return self._token_T[None, : self._length]

    def rows(self, draft: Draft) -> torch.Tensor:
        """[M,L]: the past of each node's pick, which is all that is committed and the node's own branch.

        The branch's tokens stand in the columns of their rows; the others repeat the root, which is every node's
        ancestor, so that a row holds no token that is not in its past.
        """
        token_M = draft.token_M.clamp_min(0)  # of rows that only fill up, nobody reads the pick
        branch_MM = torch.where(draft.sees_MM, token_M, token_M[0])
        return torch.cat((self.row().expand(branch_MM.shape[0], -1), branch_MM), dim=1)
