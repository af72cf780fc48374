"""What every head answers: logits of the tokens it looked at.

Axes: N row, D hidden, C candidate token, R place in a list of proposed tokens.
"""

import dataclasses
from typing import Protocol

import torch


@dataclasses.dataclass(frozen=True)
class Candidates:
    """The drafter's logits of the active tokens, with their ids in the target's vocabulary."""

    logit_NC: torch.Tensor
    """log q up to a constant for each row."""
    token_C: torch.Tensor
    """[C] when all rows look at the same tokens, [N,C] when each has its own."""

    def best(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The `count` most likely tokens of each row, best first: logits and ids, both [N,R]."""
        logit_NR, place_NR = self.logit_NC.topk(min(count, self.logit_NC.shape[-1]))
        if self.token_C.dim() == 1:
            return logit_NR, self.token_C[place_NR]
        return logit_NR, self.token_C.gather(-1, place_NR)


class Head(Protocol):
    """Turns the drafter's hidden states into candidates."""

    recordable: bool
    """Whether nothing in it waits for the device, so that a draft can be recorded (decoding/recorded.py)."""

    def candidates(self, hidden_ND: torch.Tensor) -> Candidates:
        """Candidates for rows [N,D]."""
        ...
