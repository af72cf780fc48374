"""Whether drafts pay at all, by what an answer's drafted rounds brought and cost so far."""

FORGET = 0.95
"""What the past of an answer keeps of its weight with each drafted round: it spans some twenty."""
RATE, SPENT = 1.5, 2.0
"""The rate before the first draft, and the plain steps that it weighs."""
PAUSE, LONGEST_PAUSE = 4, 64
"""Rounds without a draft before one is tried again: at first, and at most. Each trial that does not pay doubles
them; one that does halves them, so that a drafter that is right now and then is not tried all the time."""


class Trials:
    """Whether drafts pay at all, by an answer's drafted rounds, the recent ones above all."""

    def __init__(self) -> None:
        self.tokens, self.spent = RATE * SPENT, SPENT
        self.pause = PAUSE
        self.plain_left, self.idle = 0, 0
        """Rounds to go until the next draft, unless a copy gives way to one; rounds since the last draft."""
        self.small = False
        """Whether the next draft should be a small one: the last did not pay."""

    @property
    def rate(self) -> float:
        """Tokens of drafted rounds per plain step; a plain step itself brings one."""
        return max(1.0, self.tokens / self.spent)

    def drafts(self) -> bool:
        """Whether the next round drafts."""
        if self.plain_left:
            self.rest()
            return False
        self.idle = 0
        return True

    def rest(self) -> None:
        """The next round is a plain step or a copy."""
        self.plain_left, self.idle = max(0, self.plain_left - 1), self.idle + 1

    def learn(self, tokens: int, spent: float) -> None:
        """A drafted round brought so many tokens for so many plain steps."""
        self.tokens = FORGET * self.tokens + tokens
        self.spent = FORGET * self.spent + spent
        self.small = self.tokens < self.spent and tokens < spent
        if self.small:
            self.plain_left, self.pause = self.pause, min(2 * self.pause, LONGEST_PAUSE)
        elif self.tokens >= self.spent:
            self.pause = PAUSE
        else:
            self.pause = max(PAUSE, self.pause // 2)
