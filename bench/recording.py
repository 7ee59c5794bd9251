"""Measure recording: what an event costs the transaction that records it.

Three questions, each with its goal beside it:

- A transaction of the ORM that writes one business row and records one event, against the same without the event,
  and against one that inserts a row for the event by hand, in turn: commits per second of one writer and of eight,
  each a process with sessions of its own.
- A thousand events in one transaction: events per second, from the first `publish` to the return of the commit.
- What the wake-up costs: eight such writers with events, beside a relay that has something to publish all the time,
  with the trigger that asks whether the relay sleeps, and without it; then the same beside a relay that has no more
  to publish than what the writers record, and falls asleep between their commits.

    python bench/recording.py                              all three
    python bench/recording.py --only transactions --runs 3 --seconds 2        a quick look

After each run every commit has its row, and every event is in the outbox or was published. A shared machine is
noisy: trust the ratio of a pair of runs, and the more the narrower its spread. CPU is shown of the writers, and of
the whole PostgreSQL, which has the relay's part in it where there is a relay.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from typing import Any

from common import (
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
    as_dicts,
    console,
    finish,
    given_servers,
    goal,
    obey,
    parser_of,
    ratios_of,
    receive,
    relay_daemon,
    run_command,
    started,
    turns,
)
from rich.table import Table
from sqlalchemy import Engine, String, create_engine, insert
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outbox import RecordsEvents, event, publish
from outbox.tables import outbox

RATIO_GOALS = {1: 0.85, 8: 0.85}  # with the event against without it, by the number of writers
BULK_GOAL = 50_000  # events a second
WAKE_GOAL = 0.9  # with the trigger against without it
BULK = 1000  # events in one transaction
TEXT = "0123456789abcdef" * 16  # so that a payload has some 300 bytes

# What keeps the relay busy, below the writers' events in priority: those are published at once.
BACKLOG = f"""
INSERT INTO outbox (event_id, stream, type, key, priority, payload)
SELECT {NEW_ID}, %(stream)s, 'CustomerRegistered', 'customer-' || n %% 10007, -100,
       json_build_object('n', n, 'text', %(text)s::text)
FROM generate_series(1, %(events)s) AS n
"""
TRIGGER = "ALTER TABLE outbox {} TRIGGER outbox_wake"


class Base(DeclarativeBase):
    pass


class Customer(RecordsEvents, Base):
    """The business row."""

    __tablename__ = "customer"
    id: Mapped[str] = mapped_column(String, primary_key=True)
    name: Mapped[str]


@event(stream=STREAM, key="customer_id")
@dataclass(frozen=True)
class CustomerRegistered:
    customer_id: str
    text: str


# -- the writers, each in a process of its own -------------------------------------------------------


def write_plain(sessions: sessionmaker[Session], id_: str) -> None:
    """Commit one business row."""
    with sessions.begin() as session:
        session.add(Customer(id=id_, name="Ada"))


def write_event(sessions: sessionmaker[Session], id_: str) -> None:
    """Commit one business row and one event."""
    with sessions.begin() as session:
        customer = Customer(id=id_, name="Ada")
        customer.record(CustomerRegistered(id_, TEXT))
        session.add(customer)


def write_published(sessions: sessionmaker[Session], id_: str) -> None:
    """Commit one business row, and one event that is published beside it."""
    with sessions.begin() as session:
        session.add(Customer(id=id_, name="Ada"))
        publish(session, CustomerRegistered(id_, TEXT))


def write_by_hand(sessions: sessionmaker[Session], id_: str) -> None:
    """Commit one business row, and one of the outbox that nothing has checked, with SQLAlchemy's insert."""
    with sessions.begin() as session:
        session.add(Customer(id=id_, name="Ada"))
        session.flush()
        payload = {"customer_id": id_, "text": TEXT}
        row = {"stream": STREAM, "type": "CustomerRegistered", "key": id_, "payload": payload}
        session.execute(insert(outbox), row)


WRITES = {"event": write_event, "published": write_published, "hand": write_by_hand, "plain": write_plain}


def writer(pipe: Connection, servers: Servers, who: str, number: int, seconds: float) -> None:
    """Commit one transaction after the other for so long, when told to."""
    write, sessions = WRITES[who], sessionmaker(_engine(servers))
    ids = (f"{number}-{n}" for n in itertools.count())
    for _ in range(20):  # statements are compiled, and prepared
        write(sessions, next(ids))

    def commit_until() -> int:
        end = time.perf_counter() + seconds
        for commits in itertools.count(1):
            write(sessions, next(ids))
            if time.perf_counter() >= end:
                return commits
        raise AssertionError

    obey(pipe, commit_until)


def bulk_writer(pipe: Connection, servers: Servers, transactions: int) -> None:
    """Commit transactions of a thousand events, when told to."""
    sessions = sessionmaker(_engine(servers))

    def write(count: int) -> int:
        for number in range(count):
            with sessions.begin() as session:
                for n in range(BULK):
                    publish(session, CustomerRegistered(f"{number}-{n}", TEXT))
        return count * BULK

    write(3)
    obey(pipe, lambda: write(transactions))


def _engine(servers: Servers) -> Engine:
    """Return the engine of a service, connected."""
    options = {"application_name": "bench-service", "options": f"-c search_path={SCHEMA}"}
    engine = create_engine(servers.database_url, connect_args=options)
    engine.connect().close()
    return engine


# -- one run -----------------------------------------------------------------------------------------


class RecordingBench(Bench):
    """Runs that write."""

    def fresh(self, backlog: int = 0) -> None:
        """Leave both servers with no work but a backlog to publish."""
        self.empty()
        self.database.execute(
            "DROP TABLE IF EXISTS customer; CREATE TABLE customer (id varchar PRIMARY KEY, name varchar NOT NULL)"
        )
        self.database.execute(BACKLOG, {"stream": STREAM, "events": backlog, "text": TEXT})
        self.database.execute("VACUUM (ANALYZE) outbox, outbox_relay, outbox_journal")
        self.database.execute("CHECKPOINT")

    def run(
        self,
        who: str,
        write: str,
        writers: int,
        seconds: float,
        beside: contextlib.AbstractContextManager[None] | None = None,
    ) -> Run:
        """Write, beside something else if there is anything, check. Raises Wrong when a row is missing."""
        arguments = [(self.servers, write, number, seconds) for number in range(writers)]
        run = self._obeyed(who, writer, arguments, beside or contextlib.nullcontext())
        rows = self._count("SELECT count(*) FROM customer")
        if rows != run.events + 20 * writers:
            raise Wrong(f"{rows} rows of {run.events} commits")
        return run

    def bulk(self, transactions: int) -> Run:
        """Write transactions of many events, check."""
        self.fresh()
        run = self._obeyed("bulk", bulk_writer, [(self.servers, transactions)], contextlib.nullcontext())
        self.check_events(run.events + 3 * BULK)
        return run

    def check_events(self, recorded: int) -> None:
        """Raise Wrong unless as many events of the writers are there as were recorded, published ones included."""
        events = self._count("SELECT count(*) FROM outbox WHERE priority = 0") + self.redis.xlen(STREAM)
        if events != recorded:
            raise Wrong(f"{events} of {recorded} events")

    def count_waiting(self) -> int:
        return self._count("SELECT count(*) FROM outbox")

    def _count(self, query: Any) -> int:
        row = self.database.execute(query).fetchone()
        assert row is not None
        return int(row[0])

    def _obeyed(
        self,
        who: str,
        target: Callable[..., None],
        arguments: list[tuple[Any, ...]],
        beside: contextlib.AbstractContextManager[None],
    ) -> Run:
        """Let workers work at the same time; return their run, as if it were of one."""
        with contextlib.ExitStack() as stack:
            workers = [stack.enter_context(started(target, *each)) for each in arguments]
            for process, pipe in workers:
                receive(pipe, process)
            with beside:
                meter = Meter(self.database, self.redis, "bench-service")
                for _, pipe in workers:
                    pipe.send("go")
                works: list[Work] = [receive(pipe, process) for process, pipe in workers]
                run = meter.run(who, _sum(works))
            for _, pipe in workers:
                pipe.send("bye")
        rate = sum(work.events / work.seconds for work in works)
        return replace(run, rate=rate, backend_us=run.backend_us if len(works) == 1 else None)


def _sum(works: list[Work]) -> Work:
    events, seconds, cpu, peaks = zip(*works, strict=True)
    return Work(sum(events), max(seconds), sum(cpu), max(peaks))


# -- the benchmarks ----------------------------------------------------------------------------------


def transactions(
    bench: RecordingBench, write: str, writers: int, runs: int, seconds: float
) -> dict[str, Any]:
    """Commit with and without an event, and with one by hand, in turn; show and return what came out."""
    writes = {"with": write, "by hand": "hand", "without": "plain"}

    def run(who: str) -> Run:
        bench.fresh()
        run = bench.run(who, writes[who], writers, seconds)
        bench.check_events(0 if who == "without" else run.events + 20 * writers)
        return run

    what = f"an event ({write}) in the transaction of one row, {_writers(writers)}"
    return _compared(what, [*writes], run, runs, RATIO_GOALS.get(writers))


def bulk(bench: RecordingBench, count: int, runs: int) -> dict[str, Any]:
    """Commit transactions of many events; show and return what came out."""
    what = f"{BULK:,} events in a transaction, {count} transactions"
    console.print(f"\n{what}: {runs} runs")
    bench.bulk(2)
    done = [bench.bulk(count) for _ in range(runs)]
    _show(what, "events", {"bulk": done})
    rates = [run.rate for run in done]
    return {
        "what": what,
        "goals": [goal(f"{what}, events/s", rates, at_least=BULK_GOAL)],
        "runs": as_dicts({"bulk": done}),
    }


def wake(bench: RecordingBench, backlog: int, writers: int, runs: int, seconds: float) -> dict[str, Any]:
    """Commit events beside a relay, with the wake-up's trigger and without it; show and return what came out."""

    def run(who: str) -> Run:
        bench.fresh(backlog)
        bench.database.execute(TRIGGER.format("ENABLE" if who == "with" else "DISABLE"))
        try:
            run = bench.run(who, "event", writers, seconds, beside=_relay(bench, backlog))
        finally:
            bench.database.execute(TRIGGER.format("ENABLE"))
        bench.check_events(run.events + 20 * writers)
        return run

    busy = f"a relay busy with {backlog:,} other events" if backlog else "a relay that keeps up"
    what = f"the wake-up beside {busy}, {_writers(writers)}"
    return _compared(what, ["with", "without"], run, runs, WAKE_GOAL if backlog else None)


@contextlib.contextmanager
def _relay(bench: RecordingBench, backlog: int) -> Iterator[None]:
    """Run the relay's daemon. Raises Wrong when it has run out of a backlog in the end."""
    with started(relay_daemon, bench.servers) as (process, pipe):
        receive(pipe, process)
        yield
        if backlog and bench.count_waiting() == 0:
            raise Wrong(f"a backlog of {backlog:,} was too small: the relay had nothing left to publish")
        pipe.send("stop")


def _writers(count: int) -> str:
    return f"{count} writer{'s' * (count > 1)}"


# -- what is shown -----------------------------------------------------------------------------------


def _compared(
    what: str, contenders: list[str], run: Callable[[str], Run], runs: int, at_least: float | None
) -> dict[str, Any]:
    """Run each, in turn; show and return the rates, and those of the others to the last as ratios."""
    console.print(f"\n{what}: {runs} runs each")
    found: dict[str, list[Run]] = {who: [] for who in contenders}
    for number, who in turns(found, runs):
        found[who].append(run(who))
        console.print(f"  {number}/{runs} {who:<8} {found[who][-1].rate:>8,.0f} commits/s")
    _show(what, "commits", found)
    first, *others, last = contenders
    ratios = ratios_of(found, first, last)
    return {
        "what": what,
        "goals": [
            goal(what, ratios, at_least=at_least),
            *(goal(f"{what}, {other}", ratios_of(found, other, last)) for other in others),
        ],
        "ratios": ratios,
        "runs": as_dicts(found),
    }


def _show(what: str, unit: str, found: dict[str, list[Run]]) -> None:
    """Print a table of medians."""
    table = Table(title=f"{what}; CPU in microseconds of each of the {unit}")
    for heading in ("", f"{unit}/s", "spread", "Python", "backend", "PostgreSQL"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for who, runs in found.items():
        rates = [run.rate for run in runs]
        cells = [f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"]
        for name in ("python_us", "backend_us", "postgres_us"):
            values = [getattr(run, name) for run in runs]
            cells.append("-" if None in values else f"{statistics.median(values):.1f}")
        table.add_row(who, *cells)
    console.print(table)


# -- the command -------------------------------------------------------------------------------------


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    add = parser.add_argument
    add("--only", choices=["transactions", "bulk", "wake"], help="one of the three")
    add("--runs", type=int, default=5, help="runs of each")
    add("--seconds", type=float, default=5, help="how long a run writes")
    add(
        "--writers", type=int, nargs="+", default=[1, 8], help="numbers of writers; --only wake uses the last"
    )
    add(
        "--write",
        choices=["event", "published"],
        default="event",
        help="recorded on the object, or beside it",
    )
    add("--transactions", type=int, default=50, help=f"transactions of {BULK:,} events in a run")
    add("--backlog", type=int, default=500_000, help="events that keep the relay busy")
    return parser.parse_args()


def main() -> int:
    options = _options()
    runs, seconds = options.runs, options.seconds
    with given_servers(options) as servers, RecordingBench(servers) as bench:
        facts = about(bench)
        bench.fresh()
        bench.run("warm", "event", 1, 1)  # the first run of a fresh server is slower
        results = []
        if options.only in (None, "transactions"):
            for writers in options.writers:
                results.append(transactions(bench, options.write, writers, runs, seconds))
        if options.only in (None, "bulk"):
            results.append(bulk(bench, options.transactions, runs))
        if options.only in (None, "wake"):
            for backlog in (options.backlog, 0):
                results.append(wake(bench, backlog, options.writers[-1], runs, seconds))
        finish("recording", facts, results, options)
    return 0


if __name__ == "__main__":
    run_command(main)
