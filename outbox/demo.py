"""The demo: the airline of `demo_service` under load, with a relay and a consumer that are killed on the way.

`check`, `check_effects` and `latencies` hold what was committed against what is in the streams and what its handlers
did; `play` is one run of it all; `show` puts the run with lanes beside the one without.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, Self

import airportsdata
from redis import Redis
from rich import box
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from sqlalchemy import Connection, NullPool, create_engine, func, make_url, select, text

from outbox import migrate, supervisor, testing
from outbox.command import Failed
from outbox.demo_service import (
    ALERT,
    GROUP,
    IMPORT,
    KINDS,
    RATE,
    STREAM,
    Base,
    Kind,
    Notice,
    consumer_name,
)
from outbox.errors import NoServer
from outbox.loop import Every

# -- the check: what was committed against what is in the streams, and what was done about it ------


class Event(NamedTuple):
    """What tells one event from all others, on all sides."""

    key: str
    number: int


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


class Effect(NamedTuple):
    """What a handler did about an event; `at` by the clock of the machine."""

    event: Event
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


class Applied(NamedTuple):
    """What `check_effects` has found; all but the first ought to be 0."""

    effects: int
    effects_lost: int
    applied_twice: int
    without_event: int

    @property
    def clean(self) -> bool:
        return not any(self[1:])


def check_effects(committed: Iterable[Event], effects: Sequence[Effect]) -> Applied:
    """Hold what was committed against what the handlers did."""
    expected = set(committed)
    seen = Counter(effect.event for effect in effects)
    return Applied(
        effects=len(effects),
        effects_lost=len(expected - seen.keys()),
        applied_twice=len(effects) - len(seen),
        without_event=len(seen.keys() - expected),
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


def latencies(
    commits: Sequence[Commit], effects: Sequence[Effect], gap: Gap, in_hand: Collection[Event] = ()
) -> dict[str, list[float]]:
    """Return the seconds from commit to effect, sorted, by kind.

    Live events that were committed in the gap of the relay, or were in hand of the killed consumer, are of the
    kind "hit by a kill".
    """
    done = {effect.event: effect.at for effect in sorted(effects, key=lambda effect: -effect.at)}
    found: dict[str, list[float]] = {name: [] for name in (*KINDS, HIT)}
    for commit in commits:
        in_gap = gap.start <= commit.at < gap.end
        for event in commit.events:
            hit = commit.kind is not IMPORT and (in_gap or event in in_hand)
            if event in done:  # which may have been before the commit's return reached the producer
                found[HIT if hit else commit.kind.name].append(max(0.0, done[event] - commit.at))
    return {name: sorted(values) for name, values in found.items()}


HIT = "hit by a kill"


def percentile(ordered: Sequence[float], share: float) -> float:
    """Return the smallest value that at least this share does not exceed; 0 of no values."""
    return ordered[max(0, math.ceil(share * len(ordered)) - 1)] if ordered else 0.0


# -- the processes ---------------------------------------------------------------------------------


class Stalled(Failed):
    """Raised when nothing moves any more, and yet there is something to wait for."""

    def __init__(self, unhandled: int) -> None:
        super().__init__(
            f"the demo cannot go on: nothing has moved for {PATIENCE_SECONDS} s, and {unhandled:,} events wait",
            1,
        )


class Producer:
    """One of the two loads; `commits` grows as it tells them. Gone when this process is."""

    def __init__(self, name: str, environ: Mapping[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "outbox.demo_service", name],
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
            self.commits.append(Commit(KINDS[name], at, [Event(*pair) for pair in pairs]))

    def start(self) -> None:
        """Say the word that the producer of the trade waits for."""
        assert self._process.stdin
        self._process.stdin.write("go\n")
        self._process.stdin.flush()

    def stop(self) -> None:
        """Let it finish the command in hand, and wait until all is told. Raises Failed when it has failed."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._reader.join()
        self.done()

    def done(self) -> bool:
        """Return whether it has ended, and all is told. Raises Failed when it has failed."""
        if self._process.poll():
            raise Failed(f"the demo cannot go on: the process of the {self._name} has failed", 1)
        return not self._reader.is_alive()


class Daemon:
    """A relay or a consumer, under a supervisor that ends it when this process has gone."""

    def __init__(self, name: str, module_and_arguments: Sequence[str], environ: Mapping[str, str]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix=f"outbox-{name}-"))
        order: dict[str, Any] = {
            "folder": str(self._folder),
            "signal": signal.SIGTERM,
            "user": None,
            "group": None,
        }
        order["command"] = [sys.executable, "-m", *module_and_arguments]
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environ,
            start_new_session=True,
        )
        self.pid = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is Stalled:
            sys.stderr.write(self.log()[-2000:])
        assert self._supervisor.stdin
        self._supervisor.stdin.close()
        self._supervisor.wait()

    def start(self) -> int:
        """Start the process, and return its id."""
        self.pid = int(self._tell("start"))
        return self.pid

    def kill(self) -> int:
        """Kill the process with signal 9, and return the id that it had."""
        self._tell("kill")
        return self.pid

    def log(self) -> str:
        log = self._folder / "log"
        return log.read_text(errors="replace") if log.exists() else ""

    def _tell(self, word: str) -> str:
        assert self._supervisor.stdin
        assert self._supervisor.stdout
        self._supervisor.stdin.write(word + "\n")
        self._supervisor.stdin.flush()
        return self._supervisor.stdout.readline()


# -- the watch: what is seen of a run --------------------------------------------------------------

LANES = {"primary": STREAM, "backfill": f"{STREAM}:backfill"}
AIRPORTS = len(airportsdata.load())
ANNOUNCED = len(airportsdata.load("IATA"))  # those that airlines fly to: each is an event
PATIENCE_SECONDS = 20


class Servers(NamedTuple):
    """What the run has come to, as PostgreSQL and Redis see it."""

    database: Connection
    streams: Any

    def published(self) -> Counter[str]:
        return Counter({lane: self.streams.xlen(stream) for lane, stream in LANES.items()})

    def handled(self) -> int:
        return self.database.scalars(select(func.count()).select_from(Notice)).one()

    def effects(self) -> list[Effect]:
        rows = self.database.execute(select(Notice.key, Notice.number, Notice.at))
        return [Effect(Event(key, number), at) for key, number, at in rows]

    def entries(self) -> list[Entry]:
        """Return the entries of all lanes, each lane's in its order."""
        return [entry for lane in LANES.values() for entry in self._entries(lane)]

    def in_hand(self, consumer: int) -> set[Event]:
        """Return the events that a consumer was given and has not acked, by its process id."""
        found = set()
        for lane in LANES.values():
            for pending in self.streams.xpending_range(lane, GROUP, "-", "+", 1000, consumer_name(consumer)):
                ((_, fields),) = self.streams.xrange(lane, pending["message_id"], pending["message_id"])
                found.add(_event(fields))
        return found

    def _entries(self, lane: str) -> Iterator[Entry]:
        start = "-"
        while page := self.streams.xrange(lane, start, count=5000):
            for entry_id, fields in page:
                milliseconds = int(entry_id.partition(b"-")[0])
                yield Entry(lane, _event(fields), int(fields[b"priority"]), milliseconds / 1000)
            start = f"({page[-1][0].decode()}"


def _event(fields: Mapping[bytes, bytes]) -> Event:
    return Event(fields[b"subject"].decode(), json.loads(fields[b"data"])["number"])


class Moment(NamedTuple):
    """How many events are committed and published, by lane, and announced and handled."""

    at: float
    announced: int
    committed: Counter[str]
    published: Counter[str]
    handled: int

    def unhandled(self) -> int:
        return self.committed.total() - self.handled


class Pace(NamedTuple):
    """What a moment looks like beside an earlier one. Rates are events a second."""

    waiting: dict[str, int]  # in PostgreSQL, by lane
    rates: dict[str, float]  # to Redis, by lane
    handled_rate: float


class Watch:
    """Wait for one thing after another, and draw meanwhile: a picture on a terminal, lines elsewhere."""

    def __init__(
        self, console: Console, servers: Servers, commits_by_lane: Mapping[str, Sequence[list[Commit]]]
    ) -> None:
        self._console, self._servers, self._commits = console, servers, commits_by_lane
        self._started = time.monotonic()
        self._live = (
            Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None
        )
        self._redraw = Every(0.1 if self._live else 2.0)
        self._drawn = deque([self.look()], maxlen=11 if self._live else 2)  # the last second or two

    def __enter__(self) -> Self:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def look(self) -> Moment:
        """Count what is handled, then what is published, and then what is committed."""
        handled, published = self._servers.handled(), self._servers.published()
        committed: Counter[str] = Counter()
        announced = 0
        for lane, lists in self._commits.items():
            for commit in itertools.chain(*lists):
                committed[lane] += len(commit.events)
                announced += len(commit.events) if commit.kind is IMPORT else 0
        return Moment(time.monotonic(), announced, committed, published, handled)

    def until(self, condition: Callable[[Moment], object]) -> Moment:
        """Look until the condition holds, and return what was seen then. Raises Stalled."""
        moved = now = self.look()
        while not condition(now):
            if now[1:] != moved[1:]:
                moved = now
            if now.at > moved.at + PATIENCE_SECONDS:
                raise Stalled(now.unhandled())
            if self._redraw.due():
                self._draw(now)
            time.sleep(0.05)
            now = self.look()
        return now

    def say(self, line: str) -> None:
        """Print a line that stays."""
        self._console.print(
            f"{time.monotonic() - self._started:6.1f} s  {line}", soft_wrap=True, highlight=False
        )

    def _draw(self, now: Moment) -> None:
        self._drawn.append(now)
        pace = self._pace(self._drawn[0], now)
        if self._live:
            self._live.update(_picture(now, pace), refresh=True)
        else:
            parts = [
                f"{lane} {pace.waiting[lane]:,} wait, {rate:,.0f}/s" for lane, rate in pace.rates.items()
            ]
            parts.append(f"{now.handled:,} handled, {pace.handled_rate:,.0f}/s")
            self.say("; ".join([f"{now.announced:,} airports announced", *parts]))

    def _pace(self, before: Moment, now: Moment) -> Pace:
        seconds = max(0.001, now.at - before.at)
        return Pace(
            {lane: max(0, now.committed[lane] - now.published[lane]) for lane in self._commits},
            {lane: (now.published[lane] - before.published[lane]) / seconds for lane in self._commits},
            (now.handled - before.handled) / seconds,
        )


def _picture(now: Moment, pace: Pace) -> Table:
    def bar(share: int, style: str) -> ProgressBar:
        return ProgressBar(total, share, width=40, complete_style=style, finished_style=style)

    total = max(ANNOUNCED, now.committed.total())
    grid = Table.grid(padding=(0, 2))
    grid.add_row("announced", bar(now.announced, "blue"), f"{now.announced:,} of {ANNOUNCED:,} airports")
    for lane, rate in pace.rates.items():
        said = f"{pace.waiting[lane]:,} events wait in PostgreSQL, {rate:,.0f} go out a second"
        grid.add_row(lane, bar(pace.waiting[lane], "yellow"), said)
    said = f"{now.handled:,} of {now.committed.total():,} events, {pace.handled_rate:,.0f} a second"
    grid.add_row("handled", bar(now.handled, "green"), said)
    return grid


# -- one run: import, trade, and a relay and a consumer that are killed on the way -----------------


class Outcome(NamedTuple):
    """What a run has shown. Latencies are in seconds, sorted, by the name of their kind."""

    findings: Findings
    applied: Applied
    latencies: dict[str, list[float]]

    @property
    def clean(self) -> bool:
        return self.findings.clean and self.applied.clean


class Cast(NamedTuple):
    """The processes of a run."""

    importer: Producer
    trader: Producer
    relay: Daemon
    consumers: tuple[Daemon, Daemon]

    def commits(self) -> list[Commit]:
        return self.importer.commits + self.trader.commits


def play(console: Console, database_url: str, redis_url: str, lanes: bool) -> Outcome:
    """Import, trade, relay and handle, kill a relay and a consumer meanwhile, and check what came of it."""
    with ExitStack() as stack:
        engine = create_engine(database_url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
        servers = Servers(
            stack.enter_context(engine.connect()), stack.enter_context(Redis.from_url(redis_url))
        )
        cast = _cast(stack, _environ(database_url, redis_url, lanes))
        by_lane = {"primary": [cast.trader.commits, cast.importer.commits]}
        if lanes:
            by_lane = {"primary": [cast.trader.commits], "backfill": [cast.importer.commits]}
        with Watch(console, servers, by_lane) as watch:
            restarted_at, in_hand = _perform(watch, servers, cast)
        commits, entries, effects = cast.commits(), servers.entries(), servers.effects()
    committed = [event for commit in commits for event in commit.events]
    gap = gap_round(restarted_at, entries)
    return Outcome(
        check(committed, entries),
        check_effects(committed, effects),
        latencies(commits, effects, gap, in_hand),
    )


def _environ(database_url: str, redis_url: str, lanes: bool) -> dict[str, str]:
    ours = {"DATABASE_URL": database_url, "REDIS_URL": redis_url, "LANES": "on" if lanes else "off"}
    environ = {name: value for name, value in os.environ.items() if not name.startswith("OUTBOX_")}
    return environ | {f"OUTBOX_{name}": value for name, value in ours.items()}


def _cast(stack: ExitStack, environ: Mapping[str, str]) -> Cast:
    """Make the processes, which go with the stack."""

    def consumer() -> Daemon:
        return stack.enter_context(Daemon("consumer", ["outbox.demo_service", "consume"], environ))

    return Cast(
        stack.enter_context(Producer("import", environ)),
        stack.enter_context(Producer("trade", environ)),
        stack.enter_context(Daemon("relay", ["outbox.cli", "run"], environ)),
        (consumer(), consumer()),
    )


def _perform(watch: Watch, servers: Servers, cast: Cast) -> tuple[float, set[Event]]:
    """Let it all happen; return when the second relay was started, and what the killed consumer had in hand."""
    watch.say(
        f"the import of {AIRPORTS:,} airports begins, {ANNOUNCED:,} of them with an event; no relay runs yet"
    )
    now = watch.until(lambda now: now.announced >= ANNOUNCED * 3 // 4)
    watch.say(f"relay {cast.relay.start()} starts, with {now.committed.total():,} events to catch up on")
    watch.say("consumers {} and {} start".format(*(consumer.start() for consumer in cast.consumers)))
    watch.until(lambda now: now.published.total())
    cast.trader.start()
    watch.say(f"live from here on: alerts, payments and bookings, {RATE} a second")
    restarted_at = _kill_relay(watch, cast.relay)
    in_hand = _kill_consumer(watch, servers, cast.consumers[0])
    watch.until(lambda now: cast.importer.done() and now.unhandled() < RATE)
    cast.trader.stop()
    with suppress(Stalled):  # the check will tell what is lost
        watch.until(lambda now: now.unhandled() <= 0)
        watch.say("every event is handled")
    return restarted_at, in_hand


def _kill_relay(watch: Watch, relay: Daemon) -> float:
    """Kill the relay when half of the import is out; return when the next one was started."""
    now = watch.until(lambda now: now.published.total() > ANNOUNCED // 2)
    killed, started, at = relay.kill(), relay.start(), time.time()
    out, wait = now.published.total(), now.committed.total() - now.published.total()
    watch.say(f"[bold red]kill -9 {killed}[/]: {out:,} events are out, {wait:,} wait; relay {started} starts")
    now = watch.until(lambda later: later.published.total() > out)
    if adopted := re.search("batch_adopted (.*)", relay.log()):
        watch.say(f"relay {started} has {adopted[1]}")
    return at


def _kill_consumer(watch: Watch, servers: Servers, consumer: Daemon) -> set[Event]:
    """Kill a consumer when half of the import is handled; return the events that it had in hand."""
    now = watch.until(lambda now: now.handled > ANNOUNCED // 2)
    killed = consumer.kill()
    in_hand = servers.in_hand(killed)
    watch.say(
        f"[bold red]kill -9 {killed}[/]: {now.handled:,} events are handled, it had {len(in_hand)} in hand; "
        f"consumer {consumer.start()} starts"
    )
    return in_hand


# -- what is shown ---------------------------------------------------------------------------------


def run(console: Console) -> int:
    """Play it with lanes and without, on servers of its own, and show both; return the exit code.

    Raises NoServer when a server cannot be found or started, Failed when it cannot go on.
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
    return 0 if on.clean and off.clean else 1


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
    console.rule("What has arrived", align="left")
    console.print(_check_table(on, off))
    console.rule("How long from commit to handled", align="left")
    console.print(_latency_table(on, off, "#" if console.options.ascii_only else "█"))
    console.print(HOW_MEASURED, style="dim", highlight=False)
    with_lanes, without = (percentile(outcome.latencies[ALERT.name], 0.99) for outcome in (on, off))
    said = f"99 of 100 alerts were handled within {_time(with_lanes)} with lanes, {_time(without)} without."
    console.print(said, highlight=False)
    only_late = "nothing went missing, came twice or out of turn; it was only late"
    console.print(f"Lanes off: {only_late if off.clean else f'{off.findings}; {_effects(off)}'}.")
    console.print(f"Effects: {_effects(on)}.", highlight=False)
    console.print(str(on.findings), highlight=False)


HOW_MEASURED = (
    "From the return of the producer's commit to the handler's write, by the one clock of this machine. What was "
    "committed while no relay ran, or was in hand of the killed consumer, has rows of its own; the import is counted "
    "whole, from before the first relay started."
)


def _effects(outcome: Outcome) -> str:
    effects, lost, twice, _ = outcome.applied
    return f"{outcome.findings.committed:,} events, {effects:,} effects; lost {lost}, applied twice {twice}"


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


LABELS = {kind.name: f"{kind.name}, {kind.priority.name}" for kind in KINDS.values()} | {HIT: HIT}


def _time(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 0.9995 else f"{seconds:.1f} s"


def _check_table(on: Outcome, off: Outcome) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("")
    for head in ("lanes on", "lanes off"):
        table.add_column(head, justify="right")
    rows = ({**outcome.findings._asdict(), **outcome.applied._asdict()} for outcome in (on, off))
    for (name, with_lanes), without in zip(next(rows).items(), next(rows).values(), strict=True):
        table.add_row(name.replace("_", " "), f"{with_lanes:,}", f"{without:,}")
    return table
