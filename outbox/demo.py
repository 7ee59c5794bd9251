"""The demo: an airline imports the airports of the world, and goes on selling seats meanwhile.

Its first part is a service, with all that a service needs to know of outbox. The rest puts it under load: two
producers, each a process of its own; `check` and `latencies`, which hold what was committed against what is in the
streams; one `Play` of it all, with a relay that is killed halfway; and what is shown.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import airportsdata
from redis import Redis
from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outbox import (
    Domain,
    Priority,
    RecordsEvents,
    event,
    migrate,
    processing_priority,
    publish,
    supervisor,
    testing,
)
from outbox.errors import NoServer
from outbox.loop import Every

# -- the service: its events, its aggregates, its commands -----------------------------------------


@event(stream="airport", key="icao")
@dataclass(frozen=True)
class AirportRegistered:
    icao: str
    number: int  # counts the events of its key, so that their order can be checked
    name: str
    country: str


@event(stream="airport", key="icao")
@dataclass(frozen=True)
class AirportDetailed:
    icao: str
    number: int
    detail: str
    value: str | float


@event(stream="booking", key="booking")
@dataclass(frozen=True)
class BookingChanged:
    booking: str
    number: int
    state: str


@event(stream="alert", key="icao")
@dataclass(frozen=True)
class RunwayClosed:
    icao: str
    number: int


class Base(DeclarativeBase):
    pass


class Airport(RecordsEvents, Base):
    __tablename__ = "airport"
    icao: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]
    country: Mapped[str]

    @classmethod
    def register(cls, data: Mapping[str, Any]) -> Airport:
        airport = cls(icao=data["icao"], name=data["name"], country=data["country"])
        airport.record(AirportRegistered(airport.icao, 1, airport.name, airport.country))
        for number, detail in enumerate(("city", "elevation", "tz"), 2):
            airport.record(AirportDetailed(airport.icao, number, detail, data[detail]))
        return airport


class Booking(RecordsEvents, Base):
    __tablename__ = "booking"
    id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    number: Mapped[int]

    def change(self, state: str) -> int:
        self.state = state
        self.number += 1
        self.record(BookingChanged(self.id, self.number, state))
        return self.number


@dataclass(frozen=True)
class ImportAirports:
    records: Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class BookSeat:
    booking: str


@dataclass(frozen=True)
class ChangeBooking:
    booking: str
    state: str


@dataclass(frozen=True)
class CloseRunway:
    icao: str
    number: int


sessions = sessionmaker()
domain = Domain(sessions)


@domain.handles(ImportAirports)
def import_airports(command: ImportAirports, session: Session) -> None:
    session.add_all([Airport.register(record) for record in command.records])


@domain.handles(BookSeat)
def book_seat(command: BookSeat, session: Session) -> int:
    booking = Booking(id=command.booking, number=0)
    session.add(booking)
    return booking.change("booked")


@domain.handles(ChangeBooking)
def change_booking(command: ChangeBooking, session: Session) -> int:
    # Writers of one booking take turns on its row, so its events are in the stream as they happened.
    return session.get_one(Booking, command.booking, with_for_update=True).change(command.state)


@domain.handles(CloseRunway)
def close_runway(command: CloseRunway, session: Session) -> int:
    publish(session, RunwayClosed(command.icao, command.number))
    return command.number


# -- the load: two processes that tell on their standard output what they have committed -----------

CHUNK = 100  # airports in a transaction
NUMBERS = (1, 2, 3, 4)  # of the events of an airport
RATE = 150  # commands a second besides the import
HUBS = ("EDDF", "EGLL", "FAOR", "KJFK", "OMDB", "RJTT", "SBGR", "YSSY")


class Kind(NamedTuple):
    """A kind of event: what it is called, its stream, and its priority where priorities are on."""

    name: str
    stream: str
    priority: Priority


ALERT = Kind("alerts", "alert", Priority.CRITICAL)
PAYMENT = Kind("payments", "booking", Priority.HIGH)
BOOKING = Kind("bookings", "booking", Priority.NORMAL)
IMPORT = Kind("import", "airport", Priority.BULK)
KINDS = {kind.name: kind for kind in (ALERT, PAYMENT, BOOKING, IMPORT)}


class Event(NamedTuple):
    """What tells one event from all others, on both sides."""

    stream: str
    key: str
    number: int


def import_all(lanes: bool) -> None:
    """Import the airports of the world, under low priority."""
    records = list(airportsdata.load().values())
    with processing_priority(Priority.BULK) if lanes else nullcontext():
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            domain.process(ImportAirports(chunk))
            tell(IMPORT, [(record["icao"], number) for record in chunk for number in NUMBERS])


def trade(lanes: bool) -> None:
    """Book, pay, board and close runways at a steady rate, from a word on standard input until its end."""
    sys.stdin.readline()
    start = time.monotonic()
    for count, (kind, key, command) in enumerate(traffic()):
        pause = start + count / RATE - time.monotonic()
        if select.select([sys.stdin], [], [], max(0.0, pause))[0]:
            return
        number = domain.process(command, priority=kind.priority if lanes else None)
        tell(kind, [(key, number)])


def traffic() -> Iterator[tuple[Kind, str, object]]:
    """Yield commands without end: each booking is made, then paid, then boarded; some are always open."""
    for number in itertools.count(1):
        yield BOOKING, f"B{number}", BookSeat(f"B{number}")
        if number > 20:
            yield PAYMENT, f"B{number - 20}", ChangeBooking(f"B{number - 20}", "paid")
        if number > 40:
            yield BOOKING, f"B{number - 40}", ChangeBooking(f"B{number - 40}", "boarded")
        hub = HUBS[number % len(HUBS)]
        yield ALERT, hub, CloseRunway(hub, number)


def tell(kind: Kind, events: Sequence[tuple[str, int]]) -> None:
    """Tell the parent of a commit, and when it was."""
    print(json.dumps([kind.name, time.time(), events]), flush=True)


def produce(name: str) -> None:
    """Be one of the two producers, on the servers in the environment."""
    parent = os.getppid()
    sessions.configure(bind=create_engine(os.environ["OUTBOX_DATABASE_URL"]))
    try:
        {"import": import_all, "trade": trade}[name](os.environ["OUTBOX_LANES"] == "on")
    except Exception as error:
        if isinstance(error, BrokenPipeError) or os.getppid() != parent:
            os._exit(1)  # the parent has gone, and the servers with it: nobody is left to tell
        raise


# -- the check: what was committed against what is in the streams ----------------------------------


class Commit(NamedTuple):
    """Events of one kind that a producer has committed, and when, by the clock of the machine."""

    kind: Kind
    at: float
    events: list[Event]


class Entry(NamedTuple):
    """An entry of a stream; `at` is the time of its id, by the clock of Redis."""

    lane: str
    event: Event
    priority: int
    at: float


class Findings(NamedTuple):
    """What `check` has found; all but the first two ought to be 0."""

    committed: int
    in_streams: int
    lost: int
    repeated: int
    out_of_order: int
    never_committed: int

    @property
    def clean(self) -> bool:
        return not any(self[2:]) and self.committed == self.in_streams

    def __str__(self) -> str:
        return f"lost {self.lost}, repeated {self.repeated}, out of order {self.out_of_order}"


def check(committed: Iterable[Event], entries: Sequence[Entry]) -> Findings:
    """Hold what was committed against the streams; `entries` come in the order of their streams.

    Out of order is an entry with a lower number than one before it, in one lane, of one key and one priority.
    """
    expected = set(committed)
    seen = Counter(entry.event for entry in entries)
    highest: dict[tuple[str, str, int], int] = {}
    out_of_order = 0
    for entry in entries:
        group = (entry.lane, entry.event.key, entry.priority)
        out_of_order += entry.event.number < highest.get(group, 0)
        highest[group] = max(entry.event.number, highest.get(group, 0))
    return Findings(
        committed=len(expected),
        in_streams=len(entries),
        lost=len(expected - seen.keys()),
        repeated=len(entries) - len(seen),
        out_of_order=out_of_order,
        never_committed=len(seen.keys() - expected),
    )


class Gap(NamedTuple):
    """The time round the kill of a relay in which what was committed had to wait for the next relay."""

    start: float
    end: float


def gap_round(restarted_at: float, entries: Sequence[Entry]) -> Gap:
    """Return the time from the killed relay's last batch but one to the first batch of the next relay.

    A batch takes what is committed by the time of the one before, at least. All its entries have one time.
    """
    before = sorted({entry.at for entry in entries if entry.at < restarted_at})[-2:]
    after = (entry.at for entry in entries if entry.at >= restarted_at)
    return Gap(min(before, default=restarted_at), min(after, default=math.inf))


def latencies(commits: Sequence[Commit], entries: Sequence[Entry], gap: Gap) -> dict[str, list[float]]:
    """Return the seconds from commit to stream, sorted, by kind; in the gap, by the kind "gap"."""
    arrived = {entry.event: entry.at for entry in reversed(entries)}
    found: dict[str, list[float]] = {name: [] for name in (*KINDS, "gap")}
    for commit in commits:
        in_gap = gap.start <= commit.at < gap.end and commit.kind is not IMPORT
        name = "gap" if in_gap else commit.kind.name
        # An id has no more than milliseconds, so that it may lie just before the commit.
        found[name] += [max(0.0, arrived[event] - commit.at) for event in commit.events if event in arrived]
    return {name: sorted(values) for name, values in found.items()}


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share does not exceed; 0 of no values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


# -- one run: import, trade, and a relay that is killed halfway ------------------------------------


class Stalled(Exception):
    """Raised when nothing moves any more, and yet there is something to wait for."""


class Producer:
    """One of the two loads; `commits` grows as it tells them. Gone when this process is."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "outbox.demo", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
            start_new_session=True,  # Ctrl-C in the terminal is for us
        )
        self._name = name
        self.commits: list[Commit] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            name, at, pairs = json.loads(line)
            kind = KINDS[name]
            self.commits.append(Commit(kind, at, [Event(kind.stream, key, number) for key, number in pairs]))

    def start(self) -> None:
        """Say the word that the producer of the trade waits for."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Let it finish the command in hand, and wait until all is told. Raises RuntimeError when it has failed."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        self.done()

    def done(self) -> bool:
        """Return whether it has ended, and all is told. Raises RuntimeError when it has failed."""
        if self._process.poll():
            raise RuntimeError(f"the process of the {self._name} has failed")
        return not self._reader.is_alive()


class RelayProcess:
    """`outbox-relay run`, under a supervisor that ends it when this process has gone."""

    def __init__(self, environ: Mapping[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="outbox-relay-"))
        order: dict[str, Any] = {
            "folder": str(self._folder),
            "signal": signal.SIGTERM,
            "user": None,
            "group": None,
        }
        order["command"] = [sys.executable, "-m", "outbox.cli", "run"]
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is Stalled:
            sys.stderr.write(self.log()[-2000:])
        assert self._supervisor.stdin
        self._supervisor.stdin.close()
        self._supervisor.wait()

    def start(self) -> int:
        """Start a relay, and return its process id."""
        return int(self._tell("start"))

    def kill(self) -> None:
        """Kill the relay with signal 9."""
        self._tell("kill")

    def log(self) -> str:
        log = self._folder / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def _tell(self, word: str) -> str:
        assert self._supervisor.stdin
        assert self._supervisor.stdout
        self._supervisor.stdin.write(word + "\n")
        self._supervisor.stdin.flush()
        return self._supervisor.stdout.readline()


STREAMS = ("alert", "booking", "airport")
LANES = {"primary": STREAMS, "backfill": tuple(f"{stream}:backfill" for stream in STREAMS)}
AIRPORTS = len(airportsdata.load())
TO_IMPORT = AIRPORTS * len(NUMBERS)  # events
PATIENCE_SECONDS = 20


class Moment(NamedTuple):
    """How many events are committed and published, by lane, and how many airports are imported."""

    at: float
    imported: int
    committed: Counter[str]
    published: Counter[str]

    def waiting(self) -> int:
        return self.committed.total() - self.published.total()


class Watch:
    """Wait for one thing after another, and draw meanwhile: a picture on a terminal, lines elsewhere."""

    def __init__(
        self, console: Console, streams: Any, commits_by_lane: Mapping[str, Sequence[list[Commit]]]
    ) -> None:
        self._console, self._streams, self._commits = console, streams, commits_by_lane
        self._started = time.monotonic()
        self._live = (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        )
        self._redraw = Every(0.1 if self._live else 1.0)
        self._drawn = deque([self.look()], maxlen=11 if self._live else 2)  # the last second

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def look(self) -> Moment:
        """Count what is published, and then what is committed."""
        published = {lane: sum(map(self._streams.xlen, streams)) for lane, streams in LANES.items()}
        committed: Counter[str] = Counter()
        imported = 0
        for lane, lists in self._commits.items():
            for commit in itertools.chain(*lists):
                committed[lane] += len(commit.events)
                imported += len(commit.events) // len(NUMBERS) if commit.kind is IMPORT else 0
        return Moment(time.monotonic(), imported, committed, Counter(published))

    def until(self, condition: Callable[[Moment], object]) -> Moment:
        """Look until the condition holds, and return what was seen then. Raises Stalled."""
        moved = now = self.look()
        while not condition(now):
            if now[1:] != moved[1:]:
                moved = now
            if now.at > moved.at + PATIENCE_SECONDS:
                raise Stalled(
                    f"nothing has moved for {PATIENCE_SECONDS} s, and {now.waiting():,} events wait"
                )
            if self._redraw.due():
                self._draw(now)
            time.sleep(0.03)
            now = self.look()
        return now

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(
            f"{time.monotonic() - self._started:6.1f} s  {line}", soft_wrap=True, highlight=False
        )

    def _draw(self, now: Moment) -> None:
        self._drawn.append(now)
        before = self._drawn[0]
        seconds = max(0.001, now.at - before.at)
        rates = {lane: (now.published[lane] - before.published[lane]) / seconds for lane in self._commits}
        waiting = {lane: max(0, now.committed[lane] - now.published[lane]) for lane in self._commits}
        if self._live:
            self._live.update(_picture(now.imported, rates, waiting), refresh=True)
        else:
            parts = [f"{lane} {rates[lane]:,.0f}/s, {waiting[lane]:,} waiting" for lane in rates]
            self.say("; ".join([f"{now.imported:,} airports imported", *parts]))


def _picture(imported: int, rates: Mapping[str, float], waiting: Mapping[str, int]) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row(
        "imported", ProgressBar(AIRPORTS, imported, width=40), f"{imported:,} of {AIRPORTS:,} airports"
    )
    for lane, rate in rates.items():
        backlog = ProgressBar(
            TO_IMPORT, waiting[lane], width=40, complete_style="yellow", finished_style="yellow"
        )
        grid.add_row(lane, backlog, f"{waiting[lane]:,} events wait, {rate:,.0f} go out a second")
    return grid


class Outcome(NamedTuple):
    """What a run has shown. Latencies are in seconds, sorted, by the name of their kind."""

    findings: Findings
    latencies: dict[str, list[float]]
    gap: Gap


def play(console: Console, database_url: str, redis_url: str, lanes: bool) -> Outcome:
    """Import and trade while a relay works, kill it halfway, start another, and check the streams."""
    ours = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "LANES": "on" if lanes else "off"}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    environ |= {f"OUTBOX_{name}": value for name, value in ours.items()}
    with (
        Redis.from_url(redis_url) as streams,
        Producer("import", environ) as importer,
        Producer("trade", environ) as trader,
        RelayProcess(environ) as relay,
    ):
        by_lane = {"primary": [trader.commits, importer.commits]}
        if lanes:
            by_lane = {"primary": [trader.commits], "backfill": [importer.commits]}
        with Watch(console, streams, by_lane) as watch:
            restarted_at = _perform(watch, importer, trader, relay)
        commits, entries = importer.commits + trader.commits, read(streams)
    findings = check((event for commit in commits for event in commit.events), entries)
    gap = gap_round(restarted_at, entries)
    return Outcome(findings, latencies(commits, entries, gap), gap)


def _perform(watch: Watch, importer: Producer, trader: Producer, relay: RelayProcess) -> float:
    """Let it all happen, and return the time at which the second relay was started."""
    watch.say("the import begins; no relay runs yet")
    now = watch.until(lambda now: now.imported >= AIRPORTS * 3 // 4)
    first = relay.start()
    watch.say(f"relay {first} starts, with {now.waiting():,} events to catch up on")
    watch.until(lambda now: now.published.total())
    trader.start()
    watch.say(f"live from here on: alerts, payments and bookings, {RATE} a second")
    now = watch.until(lambda now: now.published.total() > TO_IMPORT // 2)
    relay.kill()
    second = relay.start()
    restarted_at = time.time()
    watch.say(
        f"[bold red]kill -9 {first}[/]: {now.published.total():,} events are out, {now.waiting():,} wait; "
        f"relay {second} starts"
    )
    watch.until(lambda now: importer.done() and now.waiting() < RATE)
    trader.stop()
    with suppress(Stalled):  # the check will tell what is lost
        watch.until(lambda now: now.waiting() <= 0)
        watch.say("no event waits any more")
    if adopted := re.search("batch_adopted (.*)", relay.log()):
        watch.say(f"relay {second} has {adopted[1]}")
    return restarted_at


def read(streams: Any) -> list[Entry]:
    """Return the entries of all lanes, each lane's in its order."""
    return [entry for lanes in LANES.values() for lane in lanes for entry in _read_lane(streams, lane)]


def _read_lane(streams: Any, lane: str) -> Iterator[Entry]:
    stream, start = lane.removesuffix(":backfill"), "-"
    while page := streams.xrange(lane, start, count=5000):
        for entry_id, fields in page:
            key, number = fields[b"subject"].decode(), json.loads(fields[b"data"])["number"]
            milliseconds = int(entry_id.partition(b"-")[0])
            yield Entry(lane, Event(stream, key, number), int(fields[b"priority"]), milliseconds / 1000)
        start = f"({page[-1][0].decode()}"


# -- what is shown ---------------------------------------------------------------------------------


def run(console: Console) -> int:
    """Play it with lanes and without, on servers of its own, and show both; return the exit code.

    Raises NoServer when a server cannot be found or started.
    """
    # A commit is on the disk when it returns, as it is in production: the default of testing is quicker.
    with testing.postgres({"fsync": "on"}) as database, testing.redis() as broker:
        console.print(f"{database.describe()}\n{broker.describe()}", highlight=False)
        outcomes = []
        for lanes in (True, False):
            console.rule(f"Lanes and priorities {'on' if lanes else 'off'}", align="left")
            with _new_database(database.url) as url, _empty_redis(broker.url):
                outcomes.append(play(console, url, broker.url, lanes))
    on, off = outcomes
    show(console, on, off)
    return 0 if on.findings.clean and off.findings.clean else 1


@contextmanager
def _new_database(server_url: str) -> Iterator[str]:
    """Create a database with the tables of the outbox and of the service, and drop it in the end."""
    server, name = make_url(server_url).set(drivername="postgresql+psycopg"), f"outbox_demo_{os.getpid()}"
    url = server.set(database=name).render_as_string(hide_password=False)
    with create_engine(server, isolation_level="AUTOCOMMIT", poolclass=NullPool).connect() as admin:
        admin.execute(text(f"CREATE DATABASE {name}"))
        try:
            migrate.upgrade(url)
            Base.metadata.create_all(create_engine(url, poolclass=NullPool))
            yield url
        finally:
            admin.execute(text(f"DROP DATABASE {name} WITH (FORCE)"))


@contextmanager
def _empty_redis(url: str) -> Iterator[None]:
    """Make sure that the Redis is empty, and flush it in the end: one with anything in it is somebody else's."""
    with Redis.from_url(url) as client:
        if client.dbsize():
            raise NoServer("the Redis of OUTBOX_TEST_REDIS_URL is not empty: the demo needs one of its own")
        try:
            yield
        finally:
            client.flushdb()


def show(console: Console, on: Outcome, off: Outcome) -> None:
    """Show both runs together; the last line is what became of the events with lanes on."""
    console.rule("How long from commit to stream", align="left")
    console.print(_latency_table(on, off, "#" if console.options.ascii_only else "█"))
    console.print(HOW_MEASURED, style="dim", highlight=False)
    console.rule("What has arrived", align="left")
    console.print(_check_table(on, off))
    with_lanes, without = (percentile(outcome.latencies[ALERT.name], 0.99) for outcome in (on, off))
    said = f"99 of 100 alerts took at most {_time(with_lanes)} with lanes, {_time(without)} without."
    console.print(said, highlight=False)
    only_late = "nothing went missing, came twice or out of turn; it was only late"
    console.print(f"Lanes off: {only_late if off.findings.clean else off.findings}.")
    console.print(str(on.findings), highlight=False)


HOW_MEASURED = (
    "From the return of the producer's commit to the time in the id of the stream's entry, by the one clock of this "
    "machine. What was committed too late for the killed relay, and before the next one was at work, has rows of its "
    "own; the import is counted whole, from before the first relay started."
)


def _latency_table(on: Outcome, off: Outcome, block: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("", no_wrap=True)
    table.add_column("lanes", no_wrap=True)
    for head in ("events", "p50", "p99", "max"):
        table.add_column(head, justify="right", no_wrap=True)
    table.add_column("p99, logarithmic", no_wrap=True)
    for name, label in LABELS.items():
        for title, lanes, outcome, colour in ((label, "on", on, "green"), ("", "off", off, "red")):
            ordered = outcome.latencies[name]
            p50, p99, most = (percentile(ordered, share) for share in (0.5, 0.99, 1.0))
            bar = block * max(1, round(4 * math.log10(max(1.0, p99 * 1000))))
            table.add_row(
                title, lanes, f"{len(ordered):,}", _time(p50), _time(p99), _time(most), f"[{colour}]{bar}"
            )
    return table


LABELS = {kind.name: f"{kind.name}, {kind.priority.name}" for kind in KINDS.values()} | {
    "gap": "while no relay ran"
}


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def _check_table(on: Outcome, off: Outcome) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for head in ("lanes on", "lanes off"):
        table.add_column(head, justify="right")
    for name in Findings._fields:
        table.add_row(
            name.replace("_", " "), *(f"{getattr(outcome.findings, name):,}" for outcome in (on, off))
        )
    table.add_row(
        "time without a relay", *(_time(outcome.gap.end - outcome.gap.start) for outcome in (on, off))
    )
    return table


if __name__ == "__main__":
    produce(sys.argv[1])
