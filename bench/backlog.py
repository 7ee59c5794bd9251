"""A backlog of events, the three that drain it, and the check that every event arrived once, in order.

The relay is the daemon's own code with its default settings, `Relay.drain()` in a process of its own. The two
loops are what one would write by hand:

    claim 500 by `DELETE ... RETURNING`  ->  XADD, pipelined  ->  commit

one with redis-py's pipeline, the other with the bytes packed by hiredis and written to the socket itself. They
promise nothing: a crash repeats their batch, a Redis that forgets loses it. All three put the same fields into
the entries.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import hiredis
import psycopg
import redis
from common import (
    NEW_ID,
    SOURCE,
    STREAM,
    Bench,
    Meter,
    Run,
    Servers,
    Wrong,
    console,
    obey,
    receive,
    started,
    ticking,
    wal_position,
)

from outbox.relay import Relay

BULK = -100
MIXED = (BULK, -50, 0, 50, 100)
BATCH = 500  # of the loops


@dataclass(frozen=True)
class Backlog:
    """Events that wait: how many, of how many bytes of JSON, in how many streams, of which priorities."""

    events: int
    payload: int = 300
    streams: int = 1
    priorities: tuple[int, ...] = MIXED

    def __str__(self) -> str:
        return f"{self.events:,} events"

    def lanes(self) -> list[str]:
        """Return the keys of all lanes in Redis."""
        streams = [STREAM] if self.streams == 1 else [f"{STREAM}:{n}" for n in range(self.streams)]
        return [stream + suffix for stream in streams for suffix in ("", ":backfill")]


# Drained before each run, by everybody: the relay has fifteen batches of it, or more, in turn on its two connections,
# each of which prepares a statement after five times. (The last claim ahead finds nothing and is rolled back, and
# psycopg forgets what that connection has prepared, here as in a daemon.) Nothing that comes then is more urgent: the
# relay would make its batches short.
WARM_UP = Backlog(30_000, priorities=(MIXED[-1],))

# 10,007 keys, priorities at random, payloads of JSON that does not compress to nothing.
FILL = f"""
INSERT INTO outbox (event_id, stream, type, key, priority, payload)
SELECT {NEW_ID}, %(stream)s || CASE WHEN %(streams)s = 1 THEN '' ELSE ':' || n %% %(streams)s END,
       'CustomerRegistered', 'customer-' || n %% 10007,
       (%(priorities)s::int[])[1 + (hashint8(n) & 65535) %% cardinality(%(priorities)s::int[])],
       (head || left(repeat(md5(n::text), 1 + %(payload)s / 32), %(payload)s - length(head) - 2) || '"}}')::json
FROM (SELECT n, '{{"n": ' || n || ', "text": "' AS head FROM generate_series(1, %(events)s) AS n) AS made
"""

# The batch size is written into the statement, so that it is planned for it.
LOOP_CLAIM = f"""
DELETE FROM outbox WHERE ctid = ANY (ARRAY(
    SELECT ctid FROM outbox ORDER BY priority DESC, created_at, id LIMIT {BATCH} FOR UPDATE SKIP LOCKED))
RETURNING id, event_id::text, stream, type, key, priority, created_at::text, payload::text
"""


# -- the three, each in a process of its own -------------------------------------------------------


def relay_worker(pipe: Connection, servers: Servers) -> None:
    """Drain the outbox with the daemon's code, when told to."""
    relay = Relay(servers.settings())
    relay.check()
    relay.drain()  # of nothing: it connects, and sees whether notifications come through
    obey(pipe, relay.drain)
    relay.close()


def loop_worker(pipe: Connection, servers: Servers) -> None:
    """Drain the outbox with a loop over redis-py's pipeline, when told to."""
    with servers.redis() as client:
        client.ping()

        def publish(rows: Sequence[Any]) -> None:
            pipeline = client.pipeline(transaction=False)
            for row in rows:
                pipeline.xadd(*_entry(row))
            pipeline.execute()

        _obey_by_loop(pipe, servers, publish)


def raw_loop_worker(pipe: Connection, servers: Servers) -> None:
    """Drain the outbox with a loop that packs its XADDs itself, when told to."""
    client = redis.Redis.from_url(servers.redis_url, protocol=2)
    connection = client.connection_pool.get_connection()  # it knows of passwords, databases and TLS
    _obey_by_loop(pipe, servers, lambda rows: _publish_raw(connection._sock, rows))


def _publish_raw(sock: Any, rows: Sequence[Any]) -> None:
    """Write all the commands at once, then read as many replies. Raises Wrong when one is an error."""
    packed = []
    for row in rows:
        lane, fields = _entry(row)
        parts = ["XADD", lane, "*"]
        for pair in fields.items():
            parts += pair
        packed.append(hiredis.pack_command(tuple(parts)))
    sock.sendall(b"".join(packed))
    reader, answered = hiredis.Reader(), 0
    while answered < len(rows):
        reader.feed(sock.recv(65536))
        while (reply := reader.gets()) is not False:
            if isinstance(reply, Exception):
                raise Wrong(f"Redis refuses an entry: {reply}")
            answered += 1


def _entry(row: Sequence[Any]) -> tuple[str, dict[Any, Any]]:
    """Return the lane and the fields of an entry, those of the relay."""
    _, event_id, stream, kind, key, priority, created_at, payload = row
    return stream if priority >= 0 else stream + ":backfill", {
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
    }


def _obey_by_loop(pipe: Connection, servers: Servers, publish: Callable[[Sequence[Any]], None]) -> None:
    with servers.connect("bench-loop", autocommit=False) as connection:
        connection.execute("SELECT 1")
        connection.commit()
        obey(pipe, lambda: plain_loop(connection, publish))


def plain_loop(connection: psycopg.Connection, publish: Callable[[Sequence[Any]], None]) -> int:
    """Claim, publish, commit, until nothing is left."""
    done = 0
    while rows := connection.execute(LOOP_CLAIM).fetchall():
        rows.sort(key=lambda row: (-row[5], row[6], row[0]))
        publish(rows)
        connection.commit()
        done += len(rows)
    connection.rollback()
    return done


WORKERS = {
    "relay": (relay_worker, "outbox-relay"),
    "loop": (loop_worker, "bench-loop"),
    "raw loop": (raw_loop_worker, "bench-loop"),
}


# -- one run ---------------------------------------------------------------------------------------


class BacklogBench(Bench):
    """Runs that drain a backlog."""

    recorded_wal_bytes = 0.0  # of PostgreSQL's log, for each event of the last backlog

    def warm_up(self) -> None:
        """Let each contender run once: the first run of a fresh server is slower."""
        for who in WORKERS:
            self.run(who, Backlog(5000))

    def fill(self, backlog: Backlog, tidy: bool = True) -> None:
        """Record the backlog; with `tidy`, PostgreSQL has no other work left to do then."""
        self.record(backlog)
        if tidy:
            self.database.execute("VACUUM (ANALYZE) outbox, outbox_relay, outbox_journal")
        self.database.execute("CHECKPOINT")

    def record(self, backlog: Backlog) -> None:
        before = wal_position(self.database)
        values = vars(backlog) | {"stream": STREAM, "priorities": list(backlog.priorities)}
        with console.status(f"recording {backlog}"):
            self.database.execute(FILL, values)
        self.recorded_wal_bytes = (wal_position(self.database) - before) / max(1, backlog.events)

    def run(
        self,
        who: str,
        backlog: Backlog,
        fresh: bool = True,
        tidy: bool = True,
        beside: contextlib.AbstractContextManager[None] | None = None,
    ) -> Run:
        """Fill, drain beside something if there is anything, check; with `fresh`, in new tables. Raises Wrong."""
        if fresh:
            self.empty()
        with self.warm(who) as drain, beside or contextlib.nullcontext():
            self.fill(backlog, tidy)
            return drain(backlog)

    @contextlib.contextmanager
    def warm(self, who: str) -> Iterator[Callable[[Backlog], Run]]:
        """Give the function of `ready`, of a contender who has been at work as a daemon has."""
        with self.ready(who) as drain:
            self.record(WARM_UP)
            drain(WARM_UP)
            yield drain

    @contextlib.contextmanager
    def ready(self, who: str) -> Iterator[Callable[[Backlog], Run]]:
        """Give a function that lets a contender, who has found nothing yet, drain what was recorded, and checks it.

        It leaves the lanes empty.
        """
        target, application = WORKERS[who]
        with started(target, self.servers) as (process, pipe):
            receive(pipe, process)

            def drain(backlog: Backlog) -> Run:
                meter = Meter(self.database, self.redis, application)
                pipe.send("go")
                with self.progress(f"{who} publishes", backlog):
                    work = receive(pipe, process)
                run = meter.run(who, work)
                if work.events != backlog.events:
                    raise Wrong(f"{work.events} of {backlog} published")
                self.check(backlog)
                self.trim(backlog)
                return run

            yield drain
            pipe.send("bye")

    def check(self, backlog: Backlog) -> None:
        """Read every entry back. Raises Wrong when an event is missing, repeated, or out of order."""
        if left := self.waiting():
            raise Wrong(f"{left} left in the outbox")
        with console.status(f"checking {backlog}"):
            self.check_lanes(backlog)

    def check_lanes(self, backlog: Backlog) -> None:
        seen = bytearray(backlog.events + 1)
        for lane in backlog.lanes():
            self._check_lane(lane, backlog, seen)
        if (lost := seen[1:].count(0)) or seen.count(1) != backlog.events:
            raise Wrong(f"lost {lost}, repeated {backlog.events - lost - seen.count(1)}")

    def trim(self, backlog: Backlog) -> None:
        """Drop all entries of the lanes, which stay."""
        for lane in backlog.lanes():
            self.redis.xtrim(lane, maxlen=0, approximate=False)

    def _check_lane(self, lane: str, backlog: Backlog, seen: bytearray) -> None:
        last = (-32768, 0)
        for priority, number in _entries(self.redis, lane, backlog.payload):
            seen[number] += 1
            if (-priority, number) < last or (priority < 0) != lane.endswith(":backfill"):
                raise Wrong(f"event {number} of priority {priority} is misplaced in {lane}")
            last = (-priority, number)

    def waiting(self) -> int:
        """Return how many events are in the outbox."""
        row = self.database.execute("SELECT count(*) FROM outbox").fetchone()
        assert row is not None
        return int(row[0])

    def published(self, backlog: Backlog) -> int:
        """Return how many entries are in the lanes."""
        pipeline = self.redis.pipeline(transaction=False)
        for lane in backlog.lanes():
            pipeline.xlen(lane)
        return sum(pipeline.execute())

    def progress(self, what: str, backlog: Backlog) -> contextlib.AbstractContextManager[None]:
        return ticking(lambda: f"{what}: {self.published(backlog):,} of {backlog}")


def _entries(client: Any, lane: str, payload: int) -> Iterator[tuple[int, int]]:
    """Yield the priority and the number of each event in a lane."""
    start, page_size = "-", max(10, min(5000, 2_000_000 // payload))
    while page := client.xrange(lane, start, count=page_size):
        for _, fields in page:
            data = fields[b"data"]
            if len(data) != payload:
                raise Wrong(f"a payload of {len(data)} bytes")
            yield int(fields[b"priority"]), int(data[6 : data.index(b",")])
        start = "(" + page[-1][0].decode()
