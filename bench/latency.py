"""Measure how long a CRITICAL event takes from its commit to its stream.

The relay runs as the daemon does. Events are committed one by one at a steady rate, and a reader that blocks on the
stream notes when each appears; beside an idle relay, and beside one that relays a BULK backlog at full speed, in turn.
What the backlog loses meanwhile is compared with its rate when nothing else is going on.

    python bench/latency.py                        50 a second, three times for ten seconds
    python bench/latency.py --runs 5 --seconds 20

The time is from the return of the commit, so an event that is there by then counts as 0. A run is not valid if an
event did not arrive, or if the backlog came to its end.
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from typing import Any, NamedTuple

from backlog import BULK, Backlog, BacklogBench
from common import (
    STREAM,
    Servers,
    Wrong,
    about,
    commit_singly,
    console,
    finish,
    given_servers,
    goal,
    parser_of,
    receive,
    relay_daemon,
    run_command,
    started,
    ticking,
    turns,
)


class Waits(NamedTuple):
    """Milliseconds from commit to stream, and what else was relayed meanwhile, in events/s."""

    p50: float
    p99: float
    most: float
    rate: float

    def __str__(self) -> str:
        return (
            f"p50 {self.p50:.2f}, p99 {self.p99:.2f}, most {self.most:.2f} ms   {self.rate:>8,.0f} others/s"
        )


def latency(bench: BacklogBench, runs: int, seconds: float, per_second: float) -> dict[str, Any]:
    """Commit single events beside an idle relay and a busy one, in turn; show and return what came out."""
    count = int(seconds * per_second)
    console.print(
        f"\n{count} events, {per_second:g} a second, {runs} times beside an idle relay and a busy one"
    )
    idle: list[Waits] = []
    busy: list[Waits] = []
    alone: list[float] = []  # the backlog's rate

    def run(who: str) -> str:
        if who == "alone":
            alone.append(bench.run("relay", Backlog(200_000, priorities=(BULK,))).rate)
            return f"{alone[-1]:>8,.0f} others/s"
        waits, enough = (idle, 0) if who == "idle" else (busy, int(1.6 * max(alone) * (seconds + 3)))
        waits.append(_waits(bench, Backlog(enough, priorities=(BULK,)), count, per_second))
        return str(waits[-1])

    for number, who in turns(("idle", "alone", "busy"), runs):  # in this order at first: busy needs a rate
        console.print(f"  {number}/{runs} {who:<5} {run(who)}")
    beside = [one.p99 / other.p99 for one, other in zip(busy, idle, strict=True)]
    kept = [one.rate / rate for one, rate in zip(busy, alone, strict=True)]
    return {
        "what": "commit to stream",
        "events": count,
        "per_second": per_second,
        "goals": [
            goal("idle, commit to stream, p50 ms", [one.p50 for one in idle], at_most=1.5),
            goal("idle, commit to stream, p99 ms", [one.p99 for one in idle]),
            goal("busy with BULK, commit to stream, p50 ms", [one.p50 for one in busy], at_most=3),
            goal("busy with BULK, commit to stream, p99 ms", [one.p99 for one in busy], at_most=10),
            goal("p99 busy / idle", beside, at_most=5),
            goal("BULK relayed meanwhile / alone", kept, at_least=0.7),
        ],
        "idle": [one._asdict() for one in idle],
        "busy": [one._asdict() for one in busy],
        "alone": alone,
    }


def _waits(bench: BacklogBench, backlog: Backlog, count: int, per_second: float) -> Waits:
    """Commit events beside the daemon, and read them. Raises Wrong when one is missing, or the backlog ran out."""
    bench.empty()
    bench.fill(backlog)
    with started(relay_daemon, bench.servers) as (process, pipe):
        receive(pipe, process)
        time.sleep(1 if backlog.events else 2)  # until it is at full speed, or asleep
        arrived: dict[int, float] = {}
        reader = threading.Thread(target=_read, args=(bench.servers, count, arrived), daemon=True)
        reader.start()
        with ticking(lambda: f"{len(arrived)} of {count} events have arrived"):
            before, started_at = bench.published(backlog), time.perf_counter()
            committed = commit_singly(bench.servers, count, per_second)
            others = bench.published(backlog) - before - len(arrived)
            seconds = time.perf_counter() - started_at
            left = bench.waiting()
            reader.join(timeout=10)
        pipe.send("stop")
    if len(arrived) != count:
        raise Wrong(f"{len(arrived)} of {count} events arrived")
    if backlog.events and not left:
        raise Wrong(f"a backlog of {backlog} came to its end")
    waits = sorted(max(0.0, arrived[number] - committed[number]) * 1000 for number in committed)
    return Waits(statistics.median(waits), waits[int(len(waits) * 0.99)], waits[-1], others / seconds)


def _read(servers: Servers, count: int, arrived: dict[int, float]) -> None:
    """Note when each event appears in the stream."""
    last = "0-0"
    client: Any
    with servers.redis() as client:
        while len(arrived) < count:
            for _, entries in client.xread({STREAM: last}, block=1000) or ():
                now = time.perf_counter()
                for entry_id, fields in entries:
                    data, last = fields[b"data"], entry_id
                    arrived[int(data[6 : data.index(b",")])] = now


# -- the command -----------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--runs", type=int, default=3, help="runs beside an idle relay, and beside a busy one")
    add("--seconds", type=float, default=10, help="how long a run commits events")
    add("--per-second", type=float, default=50, help="how many")
    return parser.parse_args()


def main() -> int:
    options = _options()
    with given_servers(options) as servers, BacklogBench(servers) as bench:
        facts = about(bench)
        bench.warm_up()
        results = [latency(bench, options.runs, options.seconds, options.per_second)]
        finish("latency", facts, results, options)
    return 0


if __name__ == "__main__":
    run_command(main)
