"""Run every fault against the product and against the control, and show what became of the events.

python -m tests.faults [--seed N] [--only NAME] [--list] [--long] [--markdown]
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import click
from rich import box
from rich.console import Console
from rich.table import Table

from outbox import testing
from outbox.report import progress
from tests.faults import failover, network, operations, relays, servers
from tests.faults.scenario import Scenario
from tests.faults.trial import Outcome, Trial

SCENARIOS = [
    scenario for module in (relays, servers, network, failover, operations) for scenario in module.SCENARIOS
]
CONTROL_TIMES = 50  # are enough to see a control fail, and most of these kill it slowly
HEADS = (
    "fault", "times", "relay", "committed", "lost", "repeated", "out of order", "priority",
    "recovery s", "verdict",
)  # fmt: skip


class Line(NamedTuple):
    """A scenario on one side: what has been shown, and what is wrong with it; empty if nothing is."""

    scenario: Scenario
    naive: bool
    outcome: Outcome
    wrong: str

    def cells(self) -> tuple[str, ...]:
        """Return the line of the table."""
        committed, _, lost, repeated, _, out_of_order = self.outcome.findings
        counts = (f"{count:,}" for count in (committed, lost, repeated, out_of_order))
        passed_over = "-" if self.outcome.passed_over is None else f"{self.outcome.passed_over:,}"
        return (
            "" if self.naive else self.scenario.what,
            f"{self.outcome.times:,}{self.scenario.unit}",
            "naive" if self.naive else "outbox",
            *counts,
            passed_over,
            spread(self.outcome.recoveries),
            self.verdict(),
        )

    def verdict(self) -> str:
        """Say in a few words how it went."""
        if self.naive:
            return self.wrong or "fails, as it must"
        if self.scenario.fails:
            return f"expected to fail: {self.wrong}" if self.wrong else "ok, against expectation"
        return self.wrong or ("ok" if self.scenario.control else f"ok; no control: {self.scenario.why}")

    def counts_as_failure(self) -> bool:
        """Return whether the run has failed by this; what is expected to fail and does not is a failure too."""
        return bool(self.wrong) != bool(self.scenario.fails and not self.naive)


def spread(seconds: Sequence[float]) -> str:
    """Return the median and the longest of some times."""
    return f"{statistics.median(seconds):.1f} / {max(seconds):.1f}" if seconds else "-"


@click.command()
@click.option("--seed", type=int, help="repeat the run with this seed")
@click.option("--only", multiple=True, help="only this fault; may be repeated")
@click.option("--list", "names", is_flag=True, help="list the faults and do nothing")
@click.option("--long", is_flag=True, help="all the times, which take hours")
@click.option("--times", type=int, help="so many times, whatever the fault")
@click.option("--markdown", is_flag=True, help="print the table for the README")
def main(
    seed: int | None, only: tuple[str, ...], names: bool, long: bool, times: int | None, markdown: bool
) -> None:
    """Kill, freeze, cut and empty everything under load, and compare what committed with what arrived."""
    chosen = [s for s in SCENARIOS if not only or s.name in only]
    if names:
        for scenario in chosen:
            click.echo(f"{scenario.name:24} {scenario.what}")
        return
    if not chosen:
        raise click.UsageError("no fault has such a name; --list shows them")
    seed = random.randrange(1_000_000) if seed is None else seed
    console = Console(stderr=True)
    where = f"seed {seed}, {testing.find_postgres().version()}, {testing.find_redis().version()}"
    console.print(where, highlight=False)
    lines: list[Line] = []
    for scenario in chosen:
        if scenario.missing:
            console.print(f"{scenario.name}: skipped, {scenario.missing}", highlight=False)
            continue
        for line in both_sides(scenario, times or (scenario.long if long else scenario.short), seed):
            console.print(
                f"{time.strftime('%H:%M:%S')} {scenario.name:24} {' '.join(line.cells()[1:])}",
                highlight=False,
                soft_wrap=True,
            )
            lines.append(line)
    show(lines, where, markdown)
    sys.exit(any(line.counts_as_failure() for line in lines))


def both_sides(scenario: Scenario, times: int, seed: int) -> Iterator[Line]:
    """Try a scenario on the product, then on the control if there is one."""
    yield try_side(scenario, times, seed, naive=False)
    if scenario.control:
        few = scenario.control_times or (times if scenario.unit else min(times, CONTROL_TIMES))
        yield try_side(scenario, few, seed, naive=True)


def try_side(scenario: Scenario, times: int, seed: int, naive: bool) -> Line:
    trials: list[Trial] = []

    def say() -> str:
        done = trials[0].done if trials else 0
        return f"{scenario.name} ({'naive' if naive else 'outbox'}): {done:,} of {times:,}{scenario.unit}"

    with progress(say):
        outcome = scenario.try_it(times, seed, naive, trials.append)
    wrong = scenario.control_verdict(outcome) if naive else scenario.verdict(outcome)
    return Line(scenario, naive, outcome, wrong)


def show(lines: list[Line], where: str, markdown: bool) -> None:
    """Print the table to stdout."""
    if markdown:
        print(f"{where}:\n")
        for row in (HEADS, ["---"] * len(HEADS), *(line.cells() for line in lines)):
            print("| " + " | ".join(row) + " |")
        return
    table = Table(*HEADS, box=box.SIMPLE_HEAD, pad_edge=False, title=where, title_justify="left")
    for line in lines:
        table.add_row(*line.cells(), style="red" if line.counts_as_failure() else "dim" if line.naive else "")
    Console().print(table)


if __name__ == "__main__":
    main()
