"""Measure how the relay's rate changes as what it has to do grows.

Against the backlog, the size of a payload, the number of streams, the relays that stand by, how long the journal is
kept, and what Redis keeps on disk; and what an event costs in PostgreSQL's log and in the memory of Redis. Each is a
table, a picture on the terminal, and one in `bench/results/` if matplotlib is there.

    python bench/growth.py                                       all
    python bench/growth.py --only streams --runs 1               a quick look at one
    python bench/growth.py --only backlog --backlogs 10000 1000000 10000000

The points of a picture are measured in turn, so that a machine that gets slower or faster does not bend it; the band
is from the lowest to the highest of the runs. After each run every entry is read back, as in `relay.py`.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import psutil
from backlog import Backlog, BacklogBench
from common import (
    Goal,
    Meter,
    Run,
    Servers,
    Work,
    about,
    as_dicts,
    console,
    cpu_seconds,
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
from plots import Chart, chart, show

PAYLOADS = (100, 300, 1_000, 3_000, 10_000, 50_000, 262_144)
AT_ONCE = (300, 10_000)  # those of them that are also relayed with no checkpoint since they were recorded
PAYLOAD_TOTAL = 100_000_000  # bytes of a run, at most
STREAMS = (1, 10, 100, 1000)
RELAYS = (1, 2, 4)
RETENTIONS = ("0", "1", "3600")  # seconds; a run takes some four
NO_FILE = "none"
PERSISTENCE = (NO_FILE, "everysec", "always")  # an append-only file, by when it is flushed to the disk

DAEMON_EVENTS = 200_000

X = TypeVar("X")


def backlogs(bench: BacklogBench, sizes: Sequence[int], runs: int) -> dict[str, Any]:
    """Drain backlogs of different sizes; each is compared with the one that is drained fastest."""
    found = _in_turn(sizes, runs, lambda size: bench.run("relay", Backlog(size)))
    best = max(sizes, key=lambda size: statistics.median(run.rate for run in found[size]))
    goals = [
        goal(
            f"rate at a backlog of {size:,} / of {best:,}",
            ratios_of(found, size, best),
            at_least=0.9,
        )
        for size in sizes
        if size != best
    ]
    peaks = [
        large.peak_mb / small.peak_mb
        for large, small in zip(found[max(sizes)], found[min(sizes)], strict=True)
    ]
    goals.append(goal(f"memory at a backlog of {max(sizes):,} / of {min(sizes):,}", peaks, at_most=1.1))
    shown = chart("backlog", "rate against backlog", "events waiting", "events/s", relay=_rates(found))
    return _result("rate against backlog", found, goals, shown)


def payloads(bench: BacklogBench, runs: int) -> dict[str, Any]:
    """Drain backlogs of about the same bytes, in payloads of different sizes."""
    recorded: dict[int, list[float]] = {size: [] for size in PAYLOADS}
    backlog_of = {size: Backlog(min(30_000, PAYLOAD_TOTAL // size), payload=size) for size in PAYLOADS}

    def run(size: int) -> Run:
        done = bench.run("relay", backlog_of[size])
        recorded[size].append(bench.recorded_wal_bytes)
        return done

    def run_at_once(size: int) -> Run:
        bench.empty()
        with bench.warm("relay") as drain:
            bench.database.execute("CHECKPOINT")
            bench.record(backlog_of[size])
            return drain(backlog_of[size])

    found = _in_turn(PAYLOADS, runs, run)
    console.print("with no checkpoint between recording and relaying")
    at_once = _in_turn(AT_ONCE, runs, run_at_once)
    x = "bytes of payload"
    rate = chart("payload-rate", "rate against payload", x, "events/s", relay=_rates(found))
    megabytes = {size: [rate * size / 1e6 for rate in rates] for size, rates in _rates(found).items()}
    volume = chart("payload-volume", "volume against payload", x, "MB/s of payload", relay=megabytes)
    cost = chart(
        "bytes",
        "what an event costs, in sizes of its payload",
        x,
        "times the payload",
        log_of_recording=_shares(recorded),
        log_of_relaying=_shares({size: [run.wal_bytes for run in runs] for size, runs in found.items()}),
        memory_of_Redis=_shares({size: [run.redis_bytes for run in runs] for size, runs in found.items()}),
    )
    usual = [
        row
        for size in AT_ONCE
        for row in (
            goal(f"log of recording an event of {size:,} bytes, bytes", recorded[size]),
            goal("log of relaying it, a checkpoint between, bytes", [run.wal_bytes for run in found[size]]),
            goal("log of relaying it, none between, bytes", [run.wal_bytes for run in at_once[size]]),
            goal("memory of Redis for it, bytes", [run.redis_bytes for run in found[size]]),
        )
    ]
    return _result("rate and bytes against payload", found, usual, rate, volume, cost)


def streams(bench: BacklogBench, runs: int) -> dict[str, Any]:
    """Drain backlogs that go to few streams or many, each of two lanes."""
    found = _in_turn(STREAMS, runs, lambda count: bench.run("relay", Backlog(50_000, streams=count)))
    shown = chart("streams", "rate against streams", "streams", "events/s", relay=_rates(found))
    return _result("rate against streams", found, [], shown)


def relays(bench: BacklogBench, runs: int) -> dict[str, Any]:
    """Let one daemon publish, or several of which one leads at a time."""
    found = _in_turn(RELAYS, runs, lambda count: _run_daemons(bench, Backlog(DAEMON_EVENTS), count))
    shown = chart("relays", "rate against relays", "relays running", "events/s", together=_rates(found))
    return _result("rate against relays", found, [], shown)


def retentions(bench: BacklogBench, runs: int) -> dict[str, Any]:
    """Let a daemon publish that keeps its journal for a shorter or longer time than the run takes."""

    def run(seconds: str) -> Run:
        return _run_daemons(bench, Backlog(DAEMON_EVENTS), 1, {"journal_retention_seconds": float(seconds)})

    found = _in_turn(RETENTIONS, runs, run)
    x = "seconds kept"
    shown = chart("retention", "rate against retention of the journal", x, "events/s", relay=_rates(found))
    return _result("rate against retention of the journal", found, [], shown)


def persistence(bench: BacklogBench, runs: int) -> dict[str, Any]:
    """Drain backlogs while Redis keeps an append-only file, flushed once a second or before each answer, or none."""

    def run(when: str) -> Run:
        with _appending(bench.redis, when):
            return bench.run("relay", Backlog(DAEMON_EVENTS))

    found = _in_turn(PERSISTENCE, runs, run)
    goals = [
        goal(
            f"rate with Redis' append-only file, flushed {when} / without one",
            ratios_of(found, when, NO_FILE),
        )
        for when in PERSISTENCE
        if when != NO_FILE
    ]
    x = "append-only file of Redis"
    shown = chart("persistence", "rate against persistence of Redis", x, "events/s", relay=_rates(found))
    return _result("rate against persistence of Redis", found, goals, shown)


MEASURES: dict[str, Callable[..., dict[str, Any]]] = {
    "backlog": backlogs,
    "payload": payloads,
    "streams": streams,
    "relays": relays,
    "retention": retentions,
    "persistence": persistence,
}


# -- what they share -------------------------------------------------------------------------------


def _in_turn(points: Sequence[X], runs: int, run: Callable[[X], Run]) -> dict[X, list[Run]]:
    """Run each point in turn."""
    found: dict[X, list[Run]] = {point: [] for point in points}
    for number, point in turns(points, runs):
        found[point].append(replace(run(point), who=str(point)))
        console.print(f"  {number}/{runs} {line(found[point][-1])}")
    return found


def _result(what: str, found: dict[Any, list[Run]], goals: list[Goal], *charts: Chart) -> dict[str, Any]:
    """Show the table and the pictures; return all of it."""
    show_runs(what, {str(point): runs for point, runs in found.items()})
    for each in charts:
        show(each)
    return {"what": what, "goals": goals, "charts": charts, "runs": as_dicts(found)}


def _rates(found: dict[X, list[Run]]) -> dict[X, list[float]]:
    return {point: [run.rate for run in runs] for point, runs in found.items()}


def _shares(found: dict[int, list[float]]) -> dict[int, list[float]]:
    """Return bytes for each byte of payload."""
    return {size: [value / size for value in values] for size, values in found.items()}


def _run_daemons(
    bench: BacklogBench, backlog: Backlog, relays: int, changes: dict[str, Any] | None = None
) -> Run:
    """Fill, let daemons publish, check. The time is from the first entry to the last."""
    bench.empty()
    bench.fill(backlog)
    with contextlib.ExitStack() as stack:
        with _held_back(bench.servers):
            daemons = [
                stack.enter_context(started(relay_daemon, bench.servers, changes)) for _ in range(relays)
            ]
            for process, pipe in daemons:
                receive(pipe, process)
            meter = Meter(bench.database, bench.redis, "outbox-relay")
            workers = [psutil.Process(process.pid) for process, _ in daemons]
            cpu = sum(map(cpu_seconds, workers))
        with bench.progress(f"{relays} relays publish", backlog):
            events, seconds = _time_published(bench, backlog)
        peak = max(worker.memory_info().rss for worker in workers)
        cpu = sum(map(cpu_seconds, workers)) - cpu
        run = meter.run("", Work(backlog.events, seconds, cpu, peak))
        for _, pipe in daemons:
            pipe.send("stop")
    bench.check(backlog)
    return replace(run, rate=events / seconds)


@contextlib.contextmanager
def _appending(client: Any, when: str) -> Iterator[None]:
    """Have Redis keep an append-only file; it has been written once, as for a daemon, when this begins."""
    if when != NO_FILE:
        client.config_set("appendfsync", when)
        client.config_set("appendonly", "yes")
        while client.info("persistence")["aof_rewrite_in_progress"]:
            time.sleep(0.01)
    try:
        yield
    finally:
        client.config_set("appendonly", "no")


@contextlib.contextmanager
def _held_back(servers: Servers) -> Iterator[None]:
    """Hold the leader's lock, as another relay would: until it is released, nobody publishes."""
    with servers.connect("bench-lock", autocommit=False) as connection:
        connection.execute("SELECT FROM outbox_relay WHERE partition = 0 FOR UPDATE")
        yield


def _time_published(bench: BacklogBench, backlog: Backlog) -> tuple[int, float]:
    """Wait until all is published; return how much was after the first look that saw some, and the time it took."""
    while not (first := bench.published(backlog)):
        time.sleep(0.001)
    since = time.perf_counter()
    while bench.published(backlog) < backlog.events:
        time.sleep(0.005)
    return backlog.events - first, time.perf_counter() - since


# -- the command -----------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--only", choices=list(MEASURES), help="one of them")
    add("--runs", type=int, default=3, help="runs of each point")
    add(
        "--backlogs",
        type=int,
        nargs="+",
        default=[10_000, 100_000, 1_000_000],
        help="sizes of the backlog; 10000000 takes some ten minutes a run, and 6 GB of Redis",
    )
    return parser.parse_args()


def main() -> int:
    options = _options()
    with given_servers(options) as servers, BacklogBench(servers) as bench:
        facts = about(bench)
        bench.warm_up()
        results = []
        for name, measure in MEASURES.items():
            if options.only not in (None, name):
                continue
            if name == "persistence" and not servers.own_redis:
                console.print("\npersistence is left out: this Redis is somebody's, and is not configured")
            else:
                console.print(f"\nrate against {name}, {options.runs} runs of each point")
                arguments = (options.backlogs, options.runs) if name == "backlog" else (options.runs,)
                results.append(measure(bench, *arguments))
        finish("growth", facts, results, options)
    return 0


if __name__ == "__main__":
    run_command(main)
