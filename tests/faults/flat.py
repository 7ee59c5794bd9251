"""Whether something stays flat over time: memory, descriptors, tables.

The first third of the samples is for warming up. Flat is what is no higher at its highest in the last third than in
the second, but for a margin: a share, and a little more. What grows steadily from nothing is half as high again.

What should stand still, and does not follow the load, may not creep either: its trend over the last two thirds, which
noise and spikes do not move, is within a bound of its own. A run with fewer than MANY samples is too short to tell that
from warming up.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import combinations, pairwise

FEWEST = 9  # samples that say something
MANY = 120  # that tell a trend from warming up
MOST_PAIRED = 300  # of which all pairs are looked at
BARS = "▁▂▃▄▅▆▇█"


@dataclass
class Series:
    """Samples of one thing, as `read` returns them, the margin in which it may grow, and the trend that it may have."""

    name: str
    unit: str
    read: Callable[[], float]
    share: float
    more: float
    creep: float = float("inf")
    values: list[float] = field(default_factory=list)

    def sample(self) -> None:
        """Take a sample. Raises what `read` does."""
        self.values.append(self.read())

    def highest(self) -> tuple[float, float]:
        """Return the highest value of the second third, and of the last."""
        third = len(self.values) // 3
        return max(self.values[third : 2 * third]), max(self.values[2 * third :])

    def trend(self) -> float:
        """Return by how much it has grown since the first third, by the median slope of all pairs (Theil-Sen)."""
        later = self.values[len(self.values) // 3 :]
        some = [*enumerate(later)][:: 1 + len(later) // MOST_PAIRED]
        return len(later) * statistics.median((b - a) / (n - m) for (m, a), (n, b) in combinations(some, 2))

    def wrong(self) -> str:
        """Say in which way it is not flat; nothing if it is."""
        if len(self.values) < FEWEST:
            return f"{len(self.values)} samples are too few"
        before, after = self.highest()
        if after > before * (1 + self.share) + self.more:
            return "grows"
        return "creeps" if len(self.values) >= MANY and self.trend() > self.creep else ""

    def cells(self) -> list[str]:
        """Return the cells of a row of a table: see `HEADS`."""
        before, after = self.highest() if len(self.values) >= FEWEST else (0.0, 0.0)
        first = self.values[0] if self.values else 0.0
        margin = before * self.share + self.more
        numbers = [f"{value:,.{1 if self.unit == 'MB' else 0}f}" for value in (first, before, after, margin)]
        trend = f"{self.trend():+.1f}" if len(self.values) >= MANY else "-"
        most = "-" if self.creep == float("inf") else f"{self.creep:.1f}"
        return [self.name, self.unit, *numbers, trend, most, self.wrong() or "flat", curve(self.values)]


HEADS = (
    "what",
    "unit",
    "first",
    "2nd third",
    "last third",
    "margin",
    "trend",
    "most",
    "verdict",
    "over time",
)


def curve(values: list[float], width: int = 40) -> str:
    """Draw values as a line of bars, from 0 to the highest."""
    width = min(width, len(values))
    cuts = [len(values) * place // width for place in range(width + 1)] if width else []
    highest = [max(values[start:end]) for start, end in pairwise(cuts)]
    top = max([*highest, 1e-9])
    return "".join(BARS[min(len(BARS) - 1, int(value / top * len(BARS)))] for value in highest)
