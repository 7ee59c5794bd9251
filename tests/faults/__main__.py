"""Run every fault against the product and against a naive relay or consumer, and show what became of the events.

Exits with 1 if the product did anything wrong, or if the naive one did not.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator

import click

from outbox import testing
from outbox.report import progress
from tests.faults import consumers, failover, network, operations, relays, servers
from tests.faults.scenario import Scenario
from tests.faults.table import Line, progress_line, show, show_markdown
from tests.faults.trial import Trial

SCENARIOS = [
    scenario
    for module in (relays, servers, network, failover, operations, consumers)
    for scenario in module.SCENARIOS
]
CONTROL_TIMES = 50  # are enough to see a control fail
CONTROL_ATTEMPTS = 8  # as its gap may be narrow: the faster the machine, the more rarely it is hit


@click.command()
@click.option("--seed", type=int, help="repeat the run with this seed")
@click.option("--only", multiple=True, help="only this fault; may be repeated")
@click.option("--list", "names", is_flag=True, help="list the faults and do nothing")
@click.option("--long", is_flag=True, help="the whole numbers, which take hours")
@click.option("--times", type=int, help="so many times, whatever the fault")
@click.option("--markdown", is_flag=True, help="print the table as docs/reliability.md has it")
def main(
    seed: int | None, only: tuple[str, ...], names: bool, long: bool, times: int | None, markdown: bool
) -> None:
    """Kill, freeze, cut and empty everything under load, and compare what committed with what arrived."""
    chosen = [scenario for scenario in SCENARIOS if not only or scenario.name in only]
    if names:
        for scenario in chosen:
            click.echo(f"{scenario.name:26} {scenario.what}")
        return
    if not chosen:
        raise click.UsageError("no fault has such a name; --list shows them")
    seed = random.randrange(1_000_000) if seed is None else seed
    where = f"seed {seed}, {testing.find_postgres().version()}, {testing.find_redis().version()}"
    say(where)
    lines: list[Line] = []
    try:
        for scenario in chosen:
            if scenario.missing:
                say(f"{scenario.name:26} skipped: {scenario.missing}")
                continue
            for line in both_sides(scenario, times or (scenario.long if long else scenario.short), seed):
                say(progress_line(line))
                lines.append(line)
    finally:  # what has been seen, after Ctrl-C too
        (show_markdown if markdown else show)(lines, where)
    sys.exit(any(line.counts_as_failure() for line in lines))


def say(line: str) -> None:
    click.echo(line, err=True)


def both_sides(scenario: Scenario, times: int, seed: int) -> Iterator[Line]:
    """Try a scenario on the product, then on the control if there is one."""
    yield try_side(scenario, times, seed, naive=False)
    if scenario.control:
        few = scenario.control_times or (times if scenario.unit else min(times, CONTROL_TIMES))
        for attempt in range(CONTROL_ATTEMPTS):
            line = try_side(scenario, few, seed + attempt, naive=True)
            if not line.wrong:
                break
        yield line._replace(outcome=line.outcome._replace(times=few * (attempt + 1)))


def try_side(scenario: Scenario, times: int, seed: int, naive: bool) -> Line:
    trials: list[Trial] = []

    def so_far() -> str:
        done = trials[0].done if trials else 0
        return f"{scenario.name:26} {'naive' if naive else 'outbox'} {done:,} of {times:,}{scenario.unit}"

    with progress(so_far):
        outcome = scenario.try_it(times, seed, naive, trials.append)
    wrong = scenario.control_verdict(outcome) if naive else scenario.verdict(outcome)
    return Line(scenario, naive, outcome, wrong)


if __name__ == "__main__":
    main()
