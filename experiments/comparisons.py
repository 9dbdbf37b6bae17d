"""What the paper or the article says, and what was found: the rows of every results table."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """One number, theirs and ours.

    `paper` is a number that is printed, a range that the text gives, or None where there is
    neither.
    """

    what: str
    paper: float | tuple[float, float] | None
    ours: float
    unit: str = ""

    @property
    def difference(self) -> float | None:
        """Ours less theirs, over theirs: 0 within a range, and from its nearer end outside."""
        if self.paper is None:
            return None
        low, high = self.paper if isinstance(self.paper, tuple) else (self.paper, self.paper)
        nearest = min(max(self.ours, low), high)
        # Where theirs is zero nothing is relative to it.
        return 0.0 if self.ours == nearest else (self.ours - nearest) / nearest if nearest else None
