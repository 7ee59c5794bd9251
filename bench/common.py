"""What the benchmarks share: servers, workers in processes of their own, the CPU that they cost, and what is shown."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.metadata
import json
import logging
import multiprocessing
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple, Self, TypedDict, TypeVar

import psutil
import psycopg
import redis
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url

import outbox
from outbox import migrate, testing
from outbox.measure import NEW_ID
from outbox.relay import Relay
from outbox.settings import Settings

SCHEMA = "outbox_bench"
STREAM = "outbox_bench:customer"
LANES = (STREAM, STREAM + ":backfill")
STATE = "outbox_bench"  # the relay's key in Redis begins with it
SOURCE = "bench"
PACKAGES = ("outbox-relay", "SQLAlchemy", "psycopg", "redis", "hiredis", "msgpack")
DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}
RESULTS = Path(__file__).parent / "results"

X = TypeVar("X")
console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


class Wrong(Exception):
    """Raised when a run did not do what it measures."""


@dataclass(frozen=True)
class Servers:
    """Where the run's PostgreSQL and Redis are."""

    database_url: str
    redis_url: str
    own_postgres: bool = False  # it was started for the run, and may be configured
    own_redis: bool = False

    def connect(self, name: str = "bench", autocommit: bool = True) -> psycopg.Connection:
        """Connect to PostgreSQL, with the benchmark's schema in front."""
        url = make_url(self.database_url).set(drivername="postgresql")
        return psycopg.connect(
            url.render_as_string(hide_password=False),
            autocommit=autocommit,
            application_name=name,
            options=f"-c search_path={SCHEMA} -c TimeZone=UTC -c DateStyle=ISO",
        )

    def redis(self) -> redis.Redis:
        return redis.Redis.from_url(self.redis_url)

    def settings(self, **changes: Any) -> Settings:
        """Return the daemon's settings: its defaults, but for what must be changed."""
        return Settings(
            database_url=self.database_url,
            redis_url=self.redis_url,
            schema=SCHEMA,
            redis_prefix=STATE,
            source=SOURCE,
            **changes,
        )


# -- workers --------------------------------------------------------------------------------------


class Work(NamedTuple):
    """What a worker did, as it saw it."""

    events: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Run:
    """One measured run.

    CPU is in microseconds an event, None of a server on another machine, or not used. So are the bytes of
    PostgreSQL's log, and those that Redis has more of in memory than before.
    """

    who: str
    events: int
    seconds: float
    rate: float
    python_us: float
    backend_us: float | None  # the worker's own connections
    postgres_us: float | None  # the whole server: that, its writers, and vacuum
    redis_us: float
    peak_mb: float
    wal_bytes: float = 0.0
    redis_bytes: float = 0.0


def turns(contenders: Iterable[X], runs: int) -> Iterator[tuple[int, X]]:
    """Yield each contender so many times, with the number of the time.

    Every second time they come in reverse, so that a machine that gets slower or faster favours none.
    """
    order = list(contenders)
    for number in range(1, runs + 1):
        yield from ((number, contender) for contender in order)
        order.reverse()


def obey(pipe: Connection, drain: Callable[[], int]) -> None:
    """Say that all is ready, drain and report at each "go", and stay until the server has been looked at."""
    pipe.send("ready")
    while pipe.recv() == "go":
        started, cpu = time.perf_counter(), time.process_time()
        events = drain()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        pipe.send(Work(events, seconds, cpu, _peak_bytes()))


def _peak_bytes() -> int:
    """Return the most memory that this process has had resident."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # of this program; ru_maxrss on Linux may be of the one before it
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


@contextlib.contextmanager
def started(
    target: Callable[..., None], *arguments: Any
) -> Iterator[tuple[multiprocessing.process.BaseProcess, Connection]]:
    """Run a worker in a fresh process, with a pipe to it, and see that it ends."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    try:
        yield process, pipe
        process.join(timeout=30)
    finally:
        process.kill()
        process.join()
        pipe.close()


def receive(pipe: Connection, process: multiprocessing.process.BaseProcess) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        process.join(timeout=5)
        raise Wrong(f"the worker ended with {process.exitcode}; see its traceback above") from None


@contextlib.contextmanager
def ticking(text: Callable[[], str]) -> Iterator[None]:
    """Show a line that changes twice a second, on a terminal."""
    stop = threading.Event()
    with console.status(text()) as status:

        def tick() -> None:
            while not stop.wait(0.5):
                status.update(text())

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def relay_daemon(pipe: Connection, servers: Servers, changes: dict[str, Any] | None = None) -> None:
    """Run the relay as the daemon does, until told to stop."""
    logging.getLogger("outbox.housekeeper").setLevel(logging.ERROR)  # nobody reads the lanes, we know
    relay = Relay(servers.settings(**changes or {}))
    relay.check()
    thread = threading.Thread(target=relay.run)
    thread.start()
    pipe.send("ready")
    with contextlib.suppress(EOFError):  # who should tell us has gone
        pipe.recv()
    relay.stop.set()
    thread.join()


def commit_singly(servers: Servers, count: int, per_second: float) -> dict[int, float]:
    """Commit one CRITICAL event at a time; return when each commit came back."""
    committed = {}
    with servers.connect("bench-writer", autocommit=False) as connection:
        start = time.perf_counter()
        for number in range(1, count + 1):
            time.sleep(max(0.0, start + number / per_second - time.perf_counter()))
            connection.execute(
                "INSERT INTO outbox (event_id, stream, type, key, priority, payload) "
                f"VALUES ({NEW_ID}, %s, 'Booked', 'k', 100, %s)",
                (STREAM, f'{{"n": {number}, "text": "one"}}'),
            )
            connection.commit()
            committed[number] = time.perf_counter()
    return committed


# -- one run --------------------------------------------------------------------------------------


class Bench:
    """The servers of a benchmark, with the outbox's tables in a schema that goes when it ends."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.database = servers.connect()
        self.redis = servers.redis()

    def __enter__(self) -> Self:
        self.database.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
        migrate.upgrade(self.servers.database_url, schema=SCHEMA)
        return self

    def __exit__(self, *error: object) -> None:
        self.empty()
        self.database.execute(f"DROP SCHEMA {SCHEMA} CASCADE")
        self.database.close()
        self.redis.close()

    def empty(self) -> None:
        """Take both servers back to where nothing has been recorded or published."""
        self.database.execute("TRUNCATE outbox, outbox_journal, outbox_dead, outbox_inbox RESTART IDENTITY")
        self.database.execute("UPDATE outbox_relay SET batch = 0, asleep = false")
        if keys := list(self.redis.scan_iter(STATE + ":*")):
            self.redis.delete(*keys)  # now, not in the background of the run


class Meter:
    """What a run costs the servers, from now on: CPU, PostgreSQL's log, the memory of Redis."""

    def __init__(self, database: psycopg.Connection, client: redis.Redis, application: str) -> None:
        self._database, self._redis = database, client
        row = database.execute(
            "SELECT pg_backend_pid(), array_agg(pid) FROM pg_stat_activity "
            "WHERE application_name = %s AND datname = current_database()",
            (application,),
        ).fetchone()
        assert row is not None
        backend = _local(row[0])
        self._postmaster = backend.parent() if backend else None
        self._backends = [process for pid in row[1] or () if (process := _local(pid))]
        self._start = self._now()

    def run(self, who: str, work: Work) -> Run:
        """Return the run that ends now."""
        spent = [
            None if before is None or now is None else (now - before) / work.events
            for before, now in zip(self._start, self._now(), strict=True)
        ]
        backend, postgres, server = (None if each is None else each * 1e6 for each in spent[:3])
        return Run(
            who=who,
            events=work.events,
            seconds=work.seconds,
            rate=work.events / work.seconds,
            python_us=work.cpu_seconds / work.events * 1e6,
            backend_us=backend,
            postgres_us=postgres,
            redis_us=server or 0.0,
            peak_mb=work.peak_bytes / 2**20,
            wal_bytes=spent[3] or 0.0,
            redis_bytes=spent[4] or 0.0,
        )

    def _now(self) -> tuple[float | None, ...]:
        info = self._redis.info()
        try:
            backends = sum(map(cpu_seconds, self._backends)) if self._backends else None
        except psutil.Error:  # a connection was lost and opened anew
            backends = None
        return (
            backends,
            _family_cpu(self._postmaster),
            info["used_cpu_user"] + info["used_cpu_sys"],
            wal_position(self._database),
            info["used_memory"],
        )


def wal_position(database: psycopg.Connection) -> int:
    """Return how many bytes PostgreSQL has written to its log, ever."""
    row = database.execute("SELECT (pg_current_wal_insert_lsn() - '0/0')::bigint").fetchone()
    assert row is not None
    return int(row[0])


def _local(pid: int | None) -> psutil.Process | None:
    """Return the backend's process, or None when it is on another machine."""
    try:
        process = psutil.Process(pid) if pid else None
        return process if process and "postgres" in process.name() else None
    except psutil.Error:
        return None


def cpu_seconds(process: psutil.Process) -> float:
    """Return what a process has used, without its children."""
    times = process.cpu_times()
    return float(times.user + times.system)


def _family_cpu(parent: psutil.Process | None) -> float | None:
    """Return what a process and its children have used, those that have ended included."""
    if parent is None:
        return None
    times = parent.cpu_times()
    ended = float(times.children_user + times.children_system)
    return ended + cpu_seconds(parent) + sum(cpu_seconds(child) for child in parent.children())


# -- what is shown ---------------------------------------------------------------------------------


def line(run: Run) -> str:
    return f"{run.who:<11} {run.rate:>8,.0f} events/s   peak {run.peak_mb:.0f} MB"


def report(
    what: str, found: dict[str, list[Run]], ours: str, other: str, at_least: float | None = None
) -> dict[str, Any]:
    """Print the table and the line of the ratio; return all of it, with its goal if it has one."""
    show_runs(what, found)
    ratios = ratios_of(found, ours, other)
    console.print(
        f"ratio {statistics.median(ratios):.2f}  ({ours} / {other}, median of {len(ratios)} pairs, "
        f"{min(ratios):.2f} to {max(ratios):.2f}, {what})"
    )
    return {
        "what": f"{ours} / {other}, {what}",
        "ratio": statistics.median(ratios),
        "goals": [] if at_least is None else [goal(f"{ours} / {other}, {what}", ratios, at_least=at_least)],
        "ratios": ratios,
        "runs": as_dicts(found),
    }


def show_runs(what: str, found: dict[str, list[Run]]) -> None:
    table = Table(title=f"{what}; CPU in microseconds an event")
    for heading in ("", "events/s", "spread", "Python", "backend", "PostgreSQL", "Redis", "peak MB"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for who, runs in found.items():
        table.add_row(who, *_row(runs))
    console.print(table)


def ratios_of(found: dict[X, list[Run]], ours: X, other: X) -> list[float]:
    """Return the ratio of each pair of runs, of which the second followed the first."""
    return [one.rate / two.rate for one, two in zip(found[ours], found[other], strict=True)]


def as_dicts(found: dict[str, list[Run]]) -> list[dict[str, Any]]:
    return [asdict(run) for runs in found.values() for run in runs]


def _row(runs: Sequence[Run]) -> list[str]:
    """Return the medians of some runs as cells of the table."""
    rates = [run.rate for run in runs]
    cells = [f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"]
    for name in ("python_us", "backend_us", "postgres_us", "redis_us"):
        values = [getattr(run, name) for run in runs]
        cells.append("-" if None in values else f"{statistics.median(values):.1f}")
    return [*cells, f"{max(run.peak_mb for run in runs):.0f}"]


def about(bench: Bench) -> dict[str, Any]:
    """Show and return the versions, the machine, the commit and the date."""
    info = bench.redis.info("server")
    row = bench.database.execute(
        "SELECT current_setting('server_version'), current_setting('fsync'), "
        "current_setting('synchronous_commit'), current_setting('shared_buffers')"
    ).fetchone()
    assert row is not None
    name = info.get("server_name", "redis")
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB, "
        f"{platform.system()} {platform.machine()}",
        "commit": _commit(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "postgresql": row[0].split()[0],
        "postgresql_settings": dict(
            zip(("fsync", "synchronous_commit", "shared_buffers"), row[1:], strict=True)
        ),
        name: info.get(f"{name}_version", info["redis_version"]),
        "redis_appendonly": bench.redis.config_get("appendonly").get("appendonly"),
    }
    console.print(", ".join(f"{name} {fact}" for name, fact in _flat(facts)))
    return facts


def _commit() -> str | None:
    """Return the commit that is measured, with "-dirty" where code is not committed; None outside a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(outbox.__file__).parent), *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--", ":/outbox", ":/bench/*.py")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _flat(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, fact in facts.items():
        yield from fact.items() if isinstance(fact, dict) else [(name, fact)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


class Goal(TypedDict):
    """A figure beside its goal: the median of some runs, the spread, and what it should be."""

    goal: str
    figure: float
    low: float
    high: float
    runs: int
    at_least: float | None
    at_most: float | None


def goal(
    text: str, values: Sequence[float], *, at_least: float | None = None, at_most: float | None = None
) -> Goal:
    """Return the median of `values`, one a run, beside its goal; without a goal it is for information."""
    return Goal(
        goal=text,
        figure=statistics.median(values),
        low=min(values),
        high=max(values),
        runs=len(values),
        at_least=at_least,
        at_most=at_most,
    )


def is_met(row: Goal) -> bool | None:
    """Return whether a goal is met, None if there is none."""
    if row["at_least"] is not None:
        return row["figure"] >= row["at_least"]
    return None if row["at_most"] is None else row["figure"] <= row["at_most"]


def show_goals(goals: Sequence[Goal]) -> None:
    """Print each figure beside its goal."""
    table = Table(title="each figure beside its goal")
    for heading in ("", "goal", "figure", "spread", "runs", ""):
        table.add_column(heading, justify="right" if heading else "left", overflow="fold")
    for row in goals:
        sign, wanted = (">=", row["at_least"]) if row["at_most"] is None else ("<=", row["at_most"])
        table.add_row(
            row["goal"],
            "-" if wanted is None else f"{sign} {number(wanted)}",
            number(row["figure"]),
            f"{number(row['low'])} to {number(row['high'])}",
            str(row["runs"]),
            {True: "met", False: "MISSED", None: ""}[is_met(row)],
        )
    console.print(table)


def number(value: float) -> str:
    """Write a number as one reads it: 48,123, 12.3 or 0.91."""
    size = abs(value)
    return f"{value:,.{0 if size >= 100 else 1 if size >= 20 else 2}f}"


def finish(
    bench: str, facts: dict[str, Any], results: list[dict[str, Any]], options: argparse.Namespace
) -> None:
    """Show the goals of all results, and keep what was found if wanted, a part of a benchmark under its own name."""
    if goals := [row for result in results for row in result["goals"]]:
        show_goals(goals)
    if options.save:
        part = getattr(options, "only", None)
        save(f"{bench}_{part}" if part else bench, facts, results)


def save(name: str, facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{facts['date'][:19].replace(':', '')}.json"
    path.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")
    console.print(f"written: {path.relative_to(RESULTS.parent.parent)}")


@contextlib.contextmanager
def given_servers(options: argparse.Namespace) -> Iterator[Servers]:
    """Give the servers that were named, or start some."""
    with contextlib.ExitStack() as stack:
        database, cache = options.database_url, options.redis_url
        own_postgres = own_redis = False
        if not database:
            server = stack.enter_context(testing.postgres(settings=DURABLE))
            database, own_postgres = server.url, server.pid is not None  # it may be one of the environment
        if not cache:
            server = stack.enter_context(testing.redis())
            cache, own_redis = server.url, server.pid is not None
        yield Servers(database, cache, own_postgres, own_redis)


def run_command(main: Callable[[], int]) -> None:
    """Run a benchmark's command and end with its status; a run that is not valid ends it with a sentence."""
    try:
        sys.exit(main())
    except Wrong as wrong:
        sys.exit(f"the run is not valid: {wrong}")


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the options of `given_servers` and of `save`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--database-url", help="a PostgreSQL to use, in a schema of its own")
    add("--redis-url", help="a Redis to use, with keys of its own")
    add("--save", action="store_true", help="write bench/results/<benchmark>-<date>.json")
    return parser
