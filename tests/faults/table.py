"""What a run of the faults shows: a line while it goes on, and a table in the end.

Of consumers, what is lost and repeated are effects, and nothing is promised of their order within a group; recovery is
the time until all that was in hand is finished, or in the hands of others. Of all else, it is the time until the next
entry is in a lane.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from outbox.report import Columns, Report
from tests.faults.scenario import Scenario
from tests.faults.trial import Outcome

HEADS = (
    "fault",
    "times",
    "side",
    "committed",
    "lost",
    "repeated",
    "out of order",
    "passed over",
    "recovery, s",
    "verdict",
)


class Line(NamedTuple):
    """A scenario on one side: what has been shown, and what is wrong with it; empty if nothing is."""

    scenario: Scenario
    naive: bool
    outcome: Outcome
    wrong: str

    def cells(self, name: str) -> list[str]:
        """Return the line's cells, with the fault under this name."""
        committed, _, lost, repeated, _, out_of_order = self.outcome.findings
        passed_over = self.outcome.passed_over
        return [
            name,
            f"{self.outcome.times:,}{self.scenario.unit}",
            "naive" if self.naive else "outbox",
            *(f"{count:,}" for count in (committed, lost, repeated)),
            "-" if self.outcome.of_effects else f"{out_of_order:,}",
            "-" if passed_over is None else f"{passed_over:,}",
            spread(self.outcome.recoveries),
            self.verdict(),
        ]

    def verdict(self) -> str:
        """Say in a few words how it went."""
        if self.naive:
            return self.wrong or f"fails: {self.scenario.control}"
        if self.scenario.fails:
            return f"expected: {self.wrong}" if self.wrong else "ok, against expectation"
        return self.wrong or ("ok" if self.scenario.control else f"ok; no control: {self.scenario.why}")

    def counts_as_failure(self) -> bool:
        """Return whether the run has failed by this; what is expected to fail and does not is a failure too."""
        return bool(self.wrong) != bool(self.scenario.fails and not self.naive)


def spread(seconds: Sequence[float]) -> str:
    """Return the median and the longest of some times."""
    return f"{statistics.median(seconds):.1f} / {max(seconds):.1f}" if seconds else "-"


def progress_line(line: Line) -> str:
    """Return what is said of a trial when it has ended."""
    name, times, side, committed, *_, recovery, verdict = line.cells(line.scenario.name)
    return f"{name:26} {side:6} {times:>5} times, {committed:>7} committed, back in {recovery} s: {verdict}"


def show(lines: Sequence[Line], where: str) -> None:
    """Print the table to stdout."""
    Report({"run": where}, [Columns("", HEADS, [line.cells(line.scenario.name) for line in lines])]).show()


def show_markdown(lines: Sequence[Line], where: str) -> None:
    """Print the table as docs/reliability.md has it: one row a fault, with the control's failures at its end."""
    controls = {line.scenario.name: line for line in lines if line.naive}
    heads = [head for head in HEADS if head not in ("side", "verdict")]
    print(f"{where}:\n")
    for row in (
        [*heads, "the naive one"],
        ["---"] * (len(heads) + 1),
        *(_row(line, controls.get(line.scenario.name)) for line in lines if not line.naive),
    ):
        print(f"| {' | '.join(row)} |")


def _row(line: Line, control: Line | None) -> list[str]:
    cells = dict(zip(HEADS, line.cells(line.scenario.what), strict=True))
    del cells["side"], cells["verdict"]
    if line.wrong:
        cells["fault"] += f" ({line.verdict()})"
    return [*cells.values(), _failures(control) if control else f"none: {line.scenario.why}"]


def _failures(control: Line) -> str:
    wrong = control.outcome.wrong().items()
    said = ", ".join(f"{count:,} {name}" if count > 1 else name for name, count in wrong)
    return f"{said} in {control.outcome.times:,}{control.scenario.unit}"
