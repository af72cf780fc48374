"""Drafts out of the text itself: what followed the last tokens when they were there before.

Code, sums and answers about a given text repeat it, and a copy needs no drafter (prompt lookup decoding, Saxena 2023,
https://github.com/apoorvumang/prompt-lookup-decoding). With the probability p that a copied token is right, and `rate`
tokens per plain step from drafted rounds, a copy of n tokens takes a draft's place when it is worth more:

    1 + p + p² + … + pⁿ  >  rate · verify(n)

p is this answer's own, by how many tokens before the copy agree. It is learnt from every round, copied or not: the
text tells what a copy would have brought. The rate is known from drafts alone, so that a draft is tried now and then in
a copy's place. Nothing here reads a clock.
"""

from collections.abc import Sequence

from coral_core.decoding.policy.trials import FORGET, LONGEST_PAUSE, PAUSE, Trials

GRAMS = (3, 2)
"""Tokens that must agree for a copy, the longer first."""
AGREEING = (2, 3, 4, 8)
"""Classes of copies: by at least so many agreeing tokens."""
RIGHT, TRIES = (0.5, 0.6, 0.7, 0.9), 3.0
"""For each class, how often a copied token is right, before the first copy; the number of tokens that this weighs.

SmolLM2-135M's greedy answers, 80,832 tokens: 0.55, 0.65, 0.73 and 0.93 of first tokens, more of later ones; a tenth of
all positions has a copy of each class, a fifth of the last. Other models repeat themselves less.
"""
LONGEST = 12
"""Tokens of a copy."""
HOPED = 2.5
"""Tokens per plain step that a draft may be hoped to bring: a copy that brings as many is not given up for a trial."""


class Copying:
    """The copies of one answer, which may take the place of its plan's drafts."""

    def __init__(self, trials: Trials, verify: Sequence[float]) -> None:
        """`trials` are those of the plan; `verify[n]` is the cost of verifying n tokens, in plain steps."""
        self.trials, self.verify = trials, verify
        self.hits, self.tries = [TRIES * right for right in RIGHT], [TRIES] * len(RIGHT)
        self.pause = PAUSE
        """Copied rounds in a row before a draft is tried in the place of one."""
        self._after: dict[tuple[int, ...], int] = {}
        self._indexed = 0
        self._found: tuple[int, int, int] | None = None
        """Of the last copy that was looked at: its class, where it begins, and the text's length then."""

    def copy(self, ids: Sequence[int], most: int) -> list[int]:
        """The tokens to verify behind `ids`, at most so many; none where a draft or a plain step is worth more.

        `ids` is the text so far: in each call that of the call before, and more.
        """
        self._learn(ids)
        self._index(ids)
        self._found = None
        begin = next((found for size in GRAMS if (found := self._after.get(tuple(ids[-size:])))), None)
        if begin is None:
            return []
        kind = sum(agreeing(ids, begin) >= least for least in AGREEING) - 1
        self._found = kind, begin, len(ids)
        right = self.hits[kind] / self.tries[kind]
        worth, best, tokens = 0.0, 0, [1.0]
        for size in range(1, min(most, LONGEST, len(self.verify) - 1) + 1):
            tokens.append(tokens[-1] + right**size)
            if (own := tokens[size] - self.trials.rate * self.verify[size]) > worth:
                worth, best = own, size
        if best == 0:
            self.pause = PAUSE
            return []
        if self.trials.idle >= self.pause and tokens[best] < HOPED * self.verify[best]:
            self.pause, self.trials.plain_left = min(2 * self.pause, LONGEST_PAUSE), 0
            return []
        self.trials.rest()
        return repeat(ids, begin, best)

    def _learn(self, ids: Sequence[int]) -> None:
        """What the last copy would have brought, of the tokens that came since."""
        if self._found is None:
            return
        kind, begin, end = self._found
        came = ids[end : end + LONGEST]
        hits = next((place for place, token in enumerate(came) if token != ids[begin + place]), len(came))
        tries = min(hits + 1, len(came))
        self.hits[kind] = FORGET**tries * self.hits[kind] + hits
        self.tries[kind] = FORGET**tries * self.tries[kind] + tries

    def _index(self, ids: Sequence[int]) -> None:
        """Where each run of tokens ended when it was there last, the present end left out."""
        for end in range(max(GRAMS[-1], self._indexed), len(ids)):
            for size in GRAMS:
                self._after[tuple(ids[max(0, end - size) : end])] = end
        self._indexed = len(ids)


def repeat(ids: Sequence[int], begin: int, count: int) -> list[int]:
    """So many tokens from `begin` on, over and over where the text ends before."""
    return [ids[begin + place % (len(ids) - begin)] for place in range(count)]


def agreeing(ids: Sequence[int], begin: int) -> int:
    """How many tokens before `begin` are those before the end, up to what a class asks for."""
    most = min(AGREEING[-1], begin)
    return next((back for back in range(most) if ids[begin - 1 - back] != ids[-1 - back]), most)
