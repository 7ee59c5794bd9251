"""Measure the relay: events per second, CPU, memory and latency.

The relay is the daemon's own code, `Relay.drain()` in a process of its own. It runs against the plainest loop
that one would write by hand, in turn with it, on the same servers, from the same backlog:

    claim a batch by `DELETE ... RETURNING`  ->  XADD by redis-py's pipeline  ->  commit

The loop promises nothing: a crash repeats its batch, a Redis that forgets loses it. The same fields go into
the entries. After each run every entry is read back: each event exactly once, in the order of its priority.

    python bench/relay.py                                  100,000 events five times, 1,000,000 twice
    python bench/relay.py --events 20000 --runs 3          a quick look
    python bench/relay.py --held-snapshot                  the relay beside an old open transaction
    python bench/relay.py --latency                        from commit to stream, on an idle relay

The servers are started for the run, or given by `--database-url` and `--redis-url`; the tables live in a
schema of their own, and nothing else of theirs is touched. A shared machine is noisy: trust the ratio of a
pair of runs, and the more the narrower its spread. CPU is shown in microseconds an event: of the worker, of
its own connection's backend, of the whole PostgreSQL (with its writers and vacuum), of Redis. The peak of
memory is the worker's, with what this file imports beside the relay.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import psycopg
import redis
from common import (
    LANES,
    SOURCE,
    STREAM,
    Bench,
    Meter,
    Run,
    Servers,
    Work,
    Wrong,
    about,
    add_common_options,
    commit_singly,
    console,
    given_servers,
    line,
    obey,
    receive,
    relay_daemon,
    report,
    save,
    started,
    ticking,
)

from outbox.relay import Relay

PAYLOAD_BYTES = 300

# Mixed priorities, 10,007 keys, payloads of JSON that does not compress to nothing.
FILL = """
INSERT INTO outbox (stream, type, key, priority, payload)
SELECT %(stream)s, 'CustomerRegistered', 'customer-' || n %% 10007,
       (ARRAY[-100, -50, 0, 50, 100])[1 + (hashint8(n) & 65535) %% 5],
       (head || left(repeat(md5(n::text), 10), %(bytes)s - length(head) - 2) || '"}')::json
FROM (SELECT n, '{"n": ' || n || ', "text": "' AS head FROM generate_series(1, %(events)s) AS n) AS made
"""

# The batch size is written into the statement, so that it is planned for it.
LOOP_CLAIM = """
DELETE FROM outbox WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM outbox ORDER BY priority DESC, created_at, id LIMIT {batch} FOR UPDATE SKIP LOCKED))
RETURNING id, event_id::text, type, key, priority, created_at::text, payload::text
"""


# -- the two that are compared, each in a process of its own ---------------------------------------


def relay_worker(pipe: Connection, servers: Servers, batch: int) -> None:
    """Drain the outbox with the daemon's code, when told to."""
    relay = Relay(servers.settings(batch))
    relay.check()
    obey(pipe, relay.drain)
    relay.close()


def loop_worker(pipe: Connection, servers: Servers, batch: int) -> None:
    """Drain the outbox with the plainest loop, when told to."""
    with servers.connect("bench-loop", autocommit=False) as connection, servers.redis() as client:
        connection.execute("SELECT 1")
        connection.commit()
        client.ping()
        obey(pipe, lambda: plain_loop(connection, client, batch))


def plain_loop(connection: psycopg.Connection, client: redis.Redis, batch: int) -> int:
    """Claim, add, commit, until nothing is left."""
    claim = LOOP_CLAIM.format(batch=batch)
    done = 0
    while rows := connection.execute(claim).fetchall():
        rows.sort(key=lambda row: (-row[4], row[5], row[0]))
        pipeline = client.pipeline(transaction=False)
        for _, event_id, kind, key, priority, created_at, payload in rows:
            pipeline.xadd(
                STREAM if priority >= 0 else LANES[1],
                {
                    "specversion": "1.0",
                    "id": event_id,
                    "source": SOURCE,
                    "type": kind,
                    "time": created_at.replace(" ", "T", 1).replace("+00", "Z"),
                    "datacontenttype": "application/json",
                    "priority": priority,
                    "data": payload,
                    "correlationid": event_id,
                    "subject": key,
                },
            )
        pipeline.execute()
        connection.commit()
        done += len(rows)
    connection.rollback()
    return done


WORKERS = {
    "relay": (relay_worker, "outbox-relay"),
    "loop": (loop_worker, "bench-loop"),
}


# -- one run ---------------------------------------------------------------------------------------


class RelayBench(Bench):
    """Runs that drain a backlog."""

    def fill(self, events: int) -> None:
        """Record the backlog, and leave both servers with no work of it to do."""
        self.empty()
        self.database.execute(FILL, {"stream": STREAM, "events": events, "bytes": PAYLOAD_BYTES})
        self.database.execute("VACUUM (ANALYZE) outbox, outbox_relay, outbox_journal")
        self.database.execute("CHECKPOINT")

    def run(self, who: str, events: int, batch: int) -> Run:
        """Fill, drain, check. Raises Wrong when an event is missing, repeated, or out of order."""
        target, application = WORKERS[who]
        with console.status(f"recording {events:,} events"):
            self.fill(events)
        with started(target, self.servers, batch) as (process, pipe):
            receive(pipe, process)
            meter = Meter(self.database, self.redis, application)
            pipe.send("go")
            with self._progress(f"{who} publishes", events):
                work = receive(pipe, process)
            run = meter.run(who, work)
            pipe.send("bye")
        with console.status(f"checking {events:,} entries"):
            self.check(events, work)
        return run

    def check(self, events: int, work: Work) -> None:
        """Read every entry back. Raises Wrong with what is amiss."""
        left = self.database.execute("SELECT count(*) FROM outbox").fetchone()
        if work.events != events or left != (0,):
            raise Wrong(f"{work.events} of {events} published, left in the outbox: {left}")
        seen = bytearray(events + 1)
        for lane in LANES:
            last = (-32768, 0)
            for priority, number in _entries(self.redis, lane):
                seen[number] += 1
                if (-priority, number) < last or (priority < 0) != (lane == LANES[1]):
                    raise Wrong(f"event {number} of priority {priority} is misplaced in {lane}")
                last = (-priority, number)
        if (lost := seen[1:].count(0)) or seen.count(1) != events:
            raise Wrong(f"lost {lost}, repeated {events - lost - seen.count(1)}")

    def _progress(self, what: str, events: int) -> contextlib.AbstractContextManager[None]:
        return ticking(lambda: f"{what}: {sum(self.redis.xlen(lane) for lane in LANES):,} of {events:,}")


def _entries(client: Any, lane: str) -> Iterator[tuple[int, int]]:
    """Yield the priority and the number of each event in a lane."""
    start = "-"
    while page := client.xrange(lane, start, count=5000):
        for _, fields in page:
            data = fields[b"data"]
            if len(data) != PAYLOAD_BYTES:
                raise Wrong(f"a payload of {len(data)} bytes")
            yield int(fields[b"priority"]), int(data[6 : data.index(b",")])
        start = "(" + page[-1][0].decode()


# -- the benchmarks --------------------------------------------------------------------------------


def compare(bench: RelayBench, events: int, runs: int, batch: int) -> dict[str, Any]:
    """Run relay and loop in turn; show and return what came out."""
    console.print(f"\nbacklog of {events:,} events, batches of {batch}, {runs} pairs of runs")
    found: dict[str, list[Run]] = {"relay": [], "loop": []}
    for number in range(1, runs + 1):
        for who, done in found.items():
            done.append(bench.run(who, events, batch))
            console.print(f"  {number}/{runs} {line(done[-1])}")
    return report(f"{events:,} events, batches of {batch}", found, "relay", "loop")


def held_snapshot(bench: RelayBench, events: int, runs: int, batch: int) -> dict[str, Any]:
    """Run the relay undisturbed and beside an open transaction, in turn; show and return what came out."""
    console.print(f"\nbacklog of {events:,} events, {runs} pairs: a snapshot is held, or not")
    found: dict[str, list[Run]] = {"held": [], "undisturbed": []}
    for number in range(1, runs + 1):
        for who, done in found.items():
            with _snapshot(bench.servers) if who == "held" else contextlib.nullcontext():
                done.append(replace(bench.run("relay", events, batch), who=who))
            console.print(f"  {number}/{runs} {line(done[-1])}")
    return report(f"{events:,} events, batches of {batch}", found, "held", "undisturbed")


@contextlib.contextmanager
def _snapshot(servers: Servers) -> Iterator[None]:
    """Hold a snapshot, as a long report does; without a lock, so that the backlog can still be made."""
    with servers.connect("bench-snapshot", autocommit=False) as connection:
        connection.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
        connection.execute("SELECT count(*) FROM pg_class")
        yield


def latency(bench: Bench, seconds: float, per_second: float) -> dict[str, Any]:
    """Commit single events beside an idle relay; show and return how long each took to its stream."""
    count = int(seconds * per_second)
    console.print(f"\n{count} events, {per_second:g} a second, on an idle relay")
    bench.empty()
    with started(relay_daemon, bench.servers) as (process, pipe):
        receive(pipe, process)
        time.sleep(2)  # until it sleeps
        arrived: dict[int, float] = {}
        reader = threading.Thread(target=_read, args=(bench.servers, count, arrived), daemon=True)
        reader.start()
        with ticking(lambda: f"{len(arrived)} of {count} events have arrived"):
            committed = commit_singly(bench.servers, count, per_second)
            reader.join(timeout=10)
        pipe.send("stop")
    if len(arrived) != count:
        raise Wrong(f"{len(arrived)} of {count} events arrived")
    waits = sorted(max(0.0, arrived[number] - committed[number]) * 1000 for number in committed)
    found = {
        "p50_ms": statistics.median(waits),
        "p99_ms": waits[int(len(waits) * 0.99)],
        "max_ms": waits[-1],
    }
    console.print("commit to stream: " + ", ".join(f"{k} {v:.2f}" for k, v in found.items()))
    return {"what": "latency", "events": count, "per_second": per_second} | found


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
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--events", type=int, nargs="+", default=[100_000, 1_000_000], help="sizes of the backlog")
    add("--runs", type=int, nargs="+", default=[5, 2], help="pairs of runs, for each size")
    add("--batch", type=int, default=500, help="events in a batch")
    add("--held-snapshot", action="store_true", help="the relay beside an old open transaction")
    add("--latency", action="store_true", help="commit to stream, on an idle relay")
    add("--seconds", type=float, default=20, help="how long --latency writes")
    add("--per-second", type=float, default=50, help="how much --latency writes")
    add_common_options(parser)
    return parser.parse_args()


def _runs(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Yield each size of the backlog with its number of runs; the last number serves the rest."""
    for place, events in enumerate(options.events):
        yield events, options.runs[min(place, len(options.runs) - 1)]


def main() -> int:
    options = _options()
    with given_servers(options) as servers, RelayBench(servers) as bench:
        facts = about(bench)
        if options.latency:
            results = [latency(bench, options.seconds, options.per_second)]
        else:
            measure = held_snapshot if options.held_snapshot else compare
            for who in WORKERS:  # the first run of a fresh server is slower
                bench.run(who, 5000, options.batch)
            results = [measure(bench, *pair, options.batch) for pair in _runs(options)]
        if options.save:
            save("relay", facts, results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Wrong as wrong:
        sys.exit(f"the run is not valid: {wrong}")
