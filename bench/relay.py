"""Measure the relay: events per second, CPU and memory, beside the plainest loops that one would write by hand.

Three questions, each answered in turn with something plainer on the same servers, from the same backlog of mixed
priorities and payloads of 300 bytes:

- How fast is it? Against a loop over redis-py's pipeline, and one that packs its commands itself (see `backlog.py`).
- Does an old open transaction slow it down? Beside one that is open for the whole run, against without it. As a
  control, the loop, whose claim reads every dead row again.
- Does a day's work? Its rate after so many events have gone through its tables, against before, and the size of the
  tables against a fresh copy of them.

    python bench/relay.py                                         all three
    python bench/relay.py --only throughput --events 20000        a quick look
    python bench/relay.py --events 1000000 --churn 10000000       as the goals say, for an hour

The servers are started for the run, or given by `--database-url` and `--redis-url`; the tables live in a
schema of their own, and nothing else of theirs is touched. A shared machine is noisy: trust the ratio of a
pair of runs, and the more the narrower its spread. CPU is shown in microseconds an event: of the worker, of
its own connections' backends, of the whole PostgreSQL (with its writers and vacuum), of Redis. The peak of
memory is the worker's, with what this file imports beside the relay.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

from backlog import WORKERS, Backlog, BacklogBench
from common import (
    Goal,
    Run,
    Servers,
    about,
    as_dicts,
    console,
    finish,
    given_servers,
    goal,
    line,
    parser_of,
    ratios_of,
    receive,
    relay_daemon,
    run_command,
    show_runs,
    started,
    turns,
)

WAVE = 100_000  # events of the churn that wait at once
CHURN_RETENTION_SECONDS = 10.0  # of the journal: an hour of it, as a day is to a few minutes


def throughput(bench: BacklogBench, events: int, runs: int) -> dict[str, Any]:
    """Run the relay and both loops in turn; show and return what came out."""
    console.print(f"\nbacklog of {events:,} events, {runs} runs of each")
    found = _in_turn(bench, Backlog(events), runs, WORKERS)
    show_runs(f"{events:,} events", found)
    return {
        "what": f"throughput, {events:,} events",
        "goals": [
            goal(
                f"relay / loop of redis-py, {events:,} events",
                ratios_of(found, "relay", "loop"),
                at_least=1.2,
            ),
            goal(f"relay / raw loop, {events:,} events", ratios_of(found, "relay", "raw loop"), at_least=1.0),
        ],
        "runs": as_dicts(found),
    }


def held_snapshot(bench: BacklogBench, events: int, runs: int, control_runs: int) -> dict[str, Any]:
    """Run beside an open transaction and undisturbed, in turn; show and return what came out."""
    console.print(f"\nbacklog of {events:,} events, {runs} pairs of runs: a snapshot is held, or not")
    backlog = Backlog(events)
    found = _in_turn(bench, backlog, runs, ("relay, held", "relay"))
    control = _in_turn(bench, backlog, control_runs, ("loop, held", "loop"))
    show_runs(f"a held snapshot, {events:,} events", found | control)
    return {
        "what": f"a held snapshot, {events:,} events",
        "goals": [
            goal("relay, a snapshot held / not", ratios_of(found, "relay, held", "relay"), at_least=0.9),
            # The control: its claim must lose far more than the relay may, or the snapshot does nothing.
            goal("loop, a snapshot held / not", ratios_of(control, "loop, held", "loop"), at_most=0.5),
        ],
        "runs": as_dicts(found | control),
    }


def _in_turn(
    bench: BacklogBench, backlog: Backlog, runs: int, contenders: Iterable[str]
) -> dict[str, list[Run]]:
    """Run each contender in turn, with a snapshot held if its name says so."""
    found: dict[str, list[Run]] = {who: [] for who in contenders}
    for number, who in turns(contenders, runs):
        name, _, held = who.partition(", ")
        beside = _snapshot(bench.servers) if held else None
        found[who].append(replace(bench.run(name, backlog, beside=beside), who=who))
        console.print(f"  {number}/{runs} {line(found[who][-1])}")
    return found


@contextlib.contextmanager
def _snapshot(servers: Servers) -> Iterator[None]:
    """Hold a snapshot, as a long report does; without a lock, so that the backlog can still be made."""
    with servers.connect("bench-snapshot", autocommit=False) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM pg_class")
        yield


# -- a day's churn ---------------------------------------------------------------------------------


def churn(bench: BacklogBench, events: int, runs: int) -> dict[str, Any]:
    """Run before and after so many events went through the tables; show and return what came out."""
    console.print(f"\n{events:,} events through the tables, {WAVE:,} at a time; {runs} runs before and after")
    backlog, found = Backlog(WAVE), {}
    found["before"] = [bench.run("relay", backlog, tidy=False) for _ in range(runs)]
    bench.empty()
    with _day_in_minutes(bench):
        _send_waves(bench, backlog, -(-events // WAVE))
        sizes = _sizes(bench, backlog, events)
    found["after"] = [bench.run("relay", backlog, fresh=False, tidy=False) for _ in range(runs)]
    show_runs(f"before and after {events:,} events", found)
    ratios = ratios_of(found, "after", "before")
    return {
        "what": f"churn, {events:,} events",
        "goals": [goal(f"relay after {events:,} events / before", ratios, at_least=0.9), *sizes],
        "runs": as_dicts(found),
    }


@contextlib.contextmanager
def _day_in_minutes(bench: BacklogBench) -> Iterator[None]:
    """Let autovacuum look every second, as it does every minute of a day; not at a server that is somebody's."""
    if bench.servers.own_postgres:
        bench.database.execute("ALTER SYSTEM SET autovacuum_naptime = '1s'")
        bench.database.execute("SELECT pg_reload_conf()")
    try:
        yield
    finally:
        if bench.servers.own_postgres:
            bench.database.execute("ALTER SYSTEM RESET autovacuum_naptime")
            bench.database.execute("SELECT pg_reload_conf()")


def _send_waves(bench: BacklogBench, backlog: Backlog, waves: int) -> None:
    """Record one backlog after the other beside the daemon, each when the one before is out; leave the last."""
    changes = {"journal_retention_seconds": CHURN_RETENTION_SECONDS}
    with started(relay_daemon, bench.servers, changes) as (process, pipe):
        receive(pipe, process)
        for number in range(1, waves + 1):
            if number > 1:
                bench.check_lanes(backlog)
                bench.trim(backlog)
            bench.record(backlog)
            with bench.progress(f"wave {number} of {waves}", backlog):
                while bench.published(backlog) < backlog.events:
                    time.sleep(0.01)
        pipe.send("stop")


def _sizes(bench: BacklogBench, backlog: Backlog, events: int) -> list[Goal]:
    """Return the size of the journal just after a wave, and of the outbox with another in it, which is drained."""
    sizes = [_size(bench, events, "the journal", "outbox_journal", "batch", "pg_total_relation_size")]
    bench.check(backlog)
    bench.trim(backlog)
    with bench.ready("relay") as drain:
        bench.fill(backlog, tidy=False)
        sizes += [
            _size(bench, events, "the outbox", "outbox", "id", "pg_table_size"),
            _size(bench, events, "the outbox's indexes", "outbox", "id", "pg_indexes_size"),
        ]
        drain(backlog)
    return sizes


def _size(bench: BacklogBench, events: int, what: str, table: str, order: str, function: str) -> Goal:
    """Return the size of a part of a table against that of a copy just made."""
    bench.database.execute(f"CREATE TABLE fresh (LIKE {table} INCLUDING ALL)")
    bench.database.execute(f"INSERT INTO fresh SELECT * FROM {table} ORDER BY {order}")
    row = bench.database.execute(f"SELECT {function}('{table}')::float8 / {function}('fresh')").fetchone()
    bench.database.execute("DROP TABLE fresh")
    assert row is not None
    return goal(f"{what} after {events:,} events / fresh", [row[0]], at_most=2.0)


# -- the command -----------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--only", choices=["throughput", "held", "churn"], help="one of the three")
    add("--events", type=int, default=200_000, help="size of the backlog")
    add("--runs", type=int, default=5, help="runs of each")
    add("--held-events", type=int, default=300_000, help="size of the backlog beside a held snapshot")
    add("--held-runs", type=int, default=3, help="pairs of runs with a snapshot held, and not")
    add("--control-runs", type=int, default=1, help="the same of the control, which is slow")
    add("--churn", type=int, default=1_000_000, help="events that go through the tables")
    add("--churn-runs", type=int, default=3, help="runs before and after that")
    return parser.parse_args()


def main() -> int:
    options = _options()
    with given_servers(options) as servers, BacklogBench(servers) as bench:
        facts = about(bench)
        bench.warm_up()
        measures = {
            "throughput": lambda: throughput(bench, options.events, options.runs),
            "held": lambda: held_snapshot(
                bench, options.held_events, options.held_runs, options.control_runs
            ),
            "churn": lambda: churn(bench, options.churn, options.churn_runs),
        }
        results = [measure() for name, measure in measures.items() if options.only in (None, name)]
        finish("relay", facts, results, options)
    return 0


if __name__ == "__main__":
    run_command(main)
