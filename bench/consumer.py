"""Measure the consumer: from commit to handled, events per second, CPU.

Three questions, each answered beside something plainer on the same servers, in turn with it:

- How long does a primary event wait for its handler, from its commit on, while much backfill is queued? The relay
  and the consumer run as the daemons do; with nothing queued, and with 100,000 events whose handler takes 2 ms.
- What does the consumer cost? Against a bare loop of redis-py's XREADGROUP and XACK with the same COUNT; neither does
  anything with its events. The loop knows no lanes, decodes nothing, retries nothing.
- What does it cost with the inbox? Against a loop that runs the same transactions, by the same sessions of SQLAlchemy.

    python bench/consumer.py                               all three
    python bench/consumer.py --only throughput --runs 3    a quick look

After each run the group must have nothing pending, and every event was handled. A shared machine is noisy: trust
the ratio of a pair of runs, and the more the narrower its spread.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
import uuid
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

from common import (
    LANES,
    NEW_ID,
    SCHEMA,
    STREAM,
    Bench,
    Meter,
    Run,
    Servers,
    Work,
    Wrong,
    about,
    commit_singly,
    console,
    finish,
    given_servers,
    goal,
    line,
    obey,
    parser_of,
    receive,
    relay_daemon,
    report,
    run_command,
    started,
    ticking,
    turns,
)
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker

from outbox import Consumer, Received
from outbox.consumer import PREFETCH

GROUP = "bench"
BACKFILL_SECONDS = 0.002  # that a handler of backfill takes
GOALS = {False: 0.8, True: 0.5}  # against the loop, by whether there is an inbox
EFFECT = text("INSERT INTO effect (event_id) VALUES (:id)")
NOTE = text(
    "INSERT INTO outbox_inbox (consumer_group, event_id) VALUES (:group, :id) ON CONFLICT DO NOTHING RETURNING 1"
)

# -- the workers, each in a process of its own -----------------------------------------------------


def consumer_worker(pipe: Connection, servers: Servers, events: int, with_inbox: bool) -> None:
    """Handle so many events with the daemon's code, when told to."""
    consumer = _consumer(servers, _sessions(servers) if with_inbox else None)
    left = iter(range(events - 1, -1, -1))

    def nothing(event: Received) -> None:
        if not next(left):
            consumer.stop()

    def effect(event: Received, session: Session) -> None:
        session.execute(EFFECT, {"id": event.id})
        nothing(event)

    def run() -> int:
        consumer.run()
        return consumer.counts["handled"]

    consumer.on_any(effect if with_inbox else nothing)
    obey(pipe, run)


def loop_worker(pipe: Connection, servers: Servers, events: int, with_inbox: bool) -> None:
    """Read, and ack, by the plainest loop, when told to."""
    sessions = _sessions(servers) if with_inbox else None
    client: Any
    with servers.redis() as client:
        client.ping()
        obey(pipe, lambda: plain_loop(client, sessions))


def plain_loop(client: Any, sessions: Callable[[], Session] | None) -> int:
    """Read a page, apply its effects if there are any, ack it, until nothing is left."""
    done = 0
    while answer := client.xreadgroup(GROUP, "loop", {STREAM: ">"}, count=PREFETCH):
        ((_, entries),) = answer
        for _, fields in entries if sessions else ():
            id_ = uuid.UUID(fields[b"id"].decode())
            with sessions() as session:
                if session.execute(NOTE, {"group": GROUP, "id": id_}).first():
                    session.execute(EFFECT, {"id": id_})
                session.commit()
        client.xack(STREAM, GROUP, *(entry_id for entry_id, _ in entries))
        done += len(entries)
    return done


def latency_worker(pipe: Connection, servers: Servers, count: int) -> None:
    """Handle events as the daemon does; tell when so many primary ones were handled, and how many others were.

    Nothing is told before that: a pipe that nobody reads would hold up the handler.
    """
    consumer = _consumer(servers, None)
    handled = {}

    @consumer.on_any
    def handle(event: Received) -> None:
        if event.lane == "backfill":
            time.sleep(BACKFILL_SECONDS)
            return
        handled[event.data["n"]] = time.perf_counter()
        if len(handled) == count:
            pipe.send("all")

    consumer.run()  # SIGTERM ends it, and the pipe
    pipe.send((handled, consumer.counts["handled"] - len(handled)))


WORKERS = {"consumer": consumer_worker, "loop": loop_worker}


def _consumer(servers: Servers, sessions: Any) -> Consumer:
    return Consumer(servers.redis_url, group=GROUP, streams=[STREAM], sessions=sessions)


def _sessions(servers: Servers) -> sessionmaker[Session]:
    """Return the sessions of a service, connected."""
    options = {"application_name": "bench-service", "options": f"-c search_path={SCHEMA}"}
    engine = create_engine(servers.database_url, connect_args=options)
    engine.connect().close()
    return sessionmaker(engine)


# -- one run ---------------------------------------------------------------------------------------


class ConsumerBench(Bench):
    """Runs that handle what is in a lane."""

    def fill(self, lane: str, events: int) -> None:
        """Publish events to a lane that nobody has read from, and leave both servers with no work of it to do."""
        self.empty()
        self.database.execute("DROP TABLE IF EXISTS effect; CREATE TABLE effect (event_id uuid)")
        self.redis.xgroup_create(STREAM, GROUP, id="0", mkstream=True)
        query = f"SELECT ({NEW_ID})::text FROM generate_series(1, %s)"
        ids = [id_ for (id_,) in self.database.execute(query, (events,))]
        for start in range(0, events, 1000):
            pipeline = self.redis.pipeline(transaction=False)
            for number, id_ in enumerate(ids[start : start + 1000], start):
                pipeline.xadd(lane, _fields(number, id_))
            pipeline.execute()
        self.database.execute("CHECKPOINT")

    def run(self, who: str, events: int, with_inbox: bool) -> Run:
        """Publish, handle, check. Raises Wrong when an event was not handled, or not acked."""
        with console.status(f"publishing {events:,} events"):
            self.fill(STREAM, events)
        with started(WORKERS[who], self.servers, events, with_inbox) as (process, pipe):
            receive(pipe, process)
            meter = Meter(self.database, self.redis, "bench-service")
            pipe.send("go")
            with console.status(f"{who} handles {events:,} events"):
                work = receive(pipe, process)
            run = meter.run(who, work)
            pipe.send("bye")
        self.check(events, work, with_inbox)
        return run

    def check(self, events: int, work: Work, with_inbox: bool) -> None:
        """Raise Wrong, with what is amiss."""
        (group,) = self.redis.xinfo_groups(STREAM)
        (last,) = self.redis.xrevrange(STREAM, count=1)
        if work.events != events or group["pending"] or group["last-delivered-id"] != last[0]:
            raise Wrong(f"{work.events} of {events} handled, {group}")
        effects = self.database.execute("SELECT count(*), count(DISTINCT event_id) FROM effect").fetchone()
        if with_inbox and effects != (events, events):
            raise Wrong(f"{effects} effects of {events} events")


def _fields(number: int, id_: str) -> Any:
    """Return an entry as the relay writes it."""
    return {
        "specversion": "1.0",
        "id": id_,
        "source": "bench",
        "type": "CustomerRegistered",
        "subject": f"customer-{number % 10007}",
        "time": "2030-01-01T00:00:00.000000Z",
        "datacontenttype": "application/json",
        "priority": "0",
        "data": json.dumps({"n": number, "text": id_ * 7}),
        "correlationid": id_,
    }


# -- the benchmarks --------------------------------------------------------------------------------


def compare(bench: ConsumerBench, events: int, runs: int, with_inbox: bool) -> dict[str, Any]:
    """Run consumer and loop in turn; show and return what came out."""
    what = f"{events:,} events, " + ("with the inbox" if with_inbox else "handlers that do nothing")
    console.print(f"\n{what}: {runs} pairs of runs")
    found: dict[str, list[Run]] = {who: [] for who in WORKERS}
    for who in WORKERS:  # the first run of a fresh server is slower
        bench.run(who, 1000, with_inbox)
    for number, who in turns(found, runs):
        found[who].append(bench.run(who, events, with_inbox))
        console.print(f"  {number}/{runs} {line(found[who][-1])}")
    return report(what, found, "consumer", "loop", at_least=GOALS[with_inbox])


def latency(bench: ConsumerBench, backfill: int, seconds: float, per_second: float) -> dict[str, Any]:
    """Commit single events beside idle daemons, and beside a long backfill; show and return their latencies."""
    console.print(f"\n{per_second:g} primary events a second, for {seconds:g} s, from commit to handled")
    found: dict[str, Any] = {"what": "latency", "per_second": per_second}
    for queued in (0, backfill):
        waits = _waits(bench, queued, int(seconds * per_second), per_second)
        place = int(len(waits) * 0.99)
        values = {"p50_ms": statistics.median(waits), "p99_ms": waits[place], "max_ms": waits[-1]}
        shown = ", ".join(f"{name} {value:.2f}" for name, value in values.items())
        console.print(f"  {queued:>7,} backfill events queued: {shown}")
        found[f"{queued} queued"] = values
    more = [found[f"{backfill} queued"][name] - found["0 queued"][name] for name in ("p50_ms", "p99_ms")]
    handler = BACKFILL_SECONDS * 1000
    return found | {
        "goals": [
            goal("primary event beside backfill: later than idle, p50 ms", more[:1], at_most=handler),
            goal("primary event beside backfill: later than idle, p99 ms", more[1:], at_most=handler),
        ]
    }


def _waits(bench: ConsumerBench, queued: int, count: int, per_second: float) -> list[float]:
    """Return the milliseconds from each commit to its handler, sorted. Raises Wrong if the backfill ran out."""
    with console.status(f"publishing {queued:,} events"):
        bench.fill(LANES[1], queued)
    with (
        started(relay_daemon, bench.servers) as (relay, relay_pipe),
        started(latency_worker, bench.servers, count) as (consumer, consumer_pipe),
    ):
        receive(relay_pipe, relay)
        time.sleep(2)  # until both are at work
        with ticking(lambda: f"{count} events, {per_second:g} a second"):
            committed = commit_singly(bench.servers, count, per_second)
            receive(consumer_pipe, consumer)
        consumer.terminate()
        handled, of_backfill = receive(consumer_pipe, consumer)
        relay_pipe.send("stop")
    if queued and of_backfill == queued:
        raise Wrong(f"{queued:,} backfill events were too few: none was left in the end")
    return sorted(max(0.0, handled[number] - committed[number]) * 1000 for number in committed)


# -- the command -----------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--only", choices=["latency", "throughput", "inbox"], help="one of the three")
    add("--events", type=int, default=50_000, help="events of a run; a tenth of it with the inbox")
    add("--runs", type=int, default=5, help="pairs of runs")
    add("--backfill", type=int, default=100_000, help="backfill events queued")
    add("--seconds", type=float, default=20, help="how long primary events are committed")
    add("--per-second", type=float, default=50, help="how many are")
    return parser.parse_args()


def main() -> int:
    options = _options()
    with given_servers(options) as servers, ConsumerBench(servers) as bench:
        facts = about(bench)
        measures = {
            "latency": lambda: latency(bench, options.backfill, options.seconds, options.per_second),
            "throughput": lambda: compare(bench, options.events, options.runs, with_inbox=False),
            "inbox": lambda: compare(bench, options.events // 10, options.runs, with_inbox=True),
        }
        results = [measure() for name, measure in measures.items() if options.only in (None, name)]
        finish("consumer", facts, results, options)
    return 0


if __name__ == "__main__":
    run_command(main)
