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
import datetime
import importlib.metadata
import json
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import psycopg
import redis
from rich.console import Console
from rich.table import Table
from sqlalchemy import make_url

from outbox import migrate, testing
from outbox.relay import Relay
from outbox.settings import Settings

SCHEMA = "outbox_bench"
STREAM = "outbox_bench:customer"
LANES = (STREAM, STREAM + ":backfill")
STATE = "outbox_bench"  # the relay's key in Redis begins with it
SOURCE = "bench"
PAYLOAD_BYTES = 300
PACKAGES = ("outbox-relay", "SQLAlchemy", "psycopg", "redis", "hiredis", "msgpack")

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

DURABLE = {"fsync": "on", "synchronous_commit": "on", "full_page_writes": "on"}

console = Console(highlight=False, width=None if sys.stdout.isatty() else 110)


class Wrong(Exception):
    """Raised when a run did not do what it measures."""


@dataclass(frozen=True)
class Servers:
    """Where the run's PostgreSQL and Redis are."""

    database_url: str
    redis_url: str

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

    def settings(self, batch: int) -> Settings:
        return Settings(
            database_url=self.database_url,
            redis_url=self.redis_url,
            schema=SCHEMA,
            redis_prefix=STATE,
            source=SOURCE,
            batch_size=batch,
        )


class Work(NamedTuple):
    """What a worker did, as it saw it."""

    events: int
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Run:
    """One measured run. CPU is in microseconds an event; None where the server is on another machine."""

    who: str
    events: int
    seconds: float
    rate: float
    python_us: float
    backend_us: float | None  # the worker's own connection
    postgres_us: float | None  # the whole server: that, its writers, and vacuum
    redis_us: float
    peak_mb: float


# -- the two that are compared, each in a process of its own ---------------------------------------


def relay_worker(pipe: Connection, servers: Servers, batch: int) -> None:
    """Drain the outbox with the daemon's code, when told to."""
    relay = Relay(servers.settings(batch))
    relay.check()
    _work(pipe, relay.drain)
    relay.close()


def loop_worker(pipe: Connection, servers: Servers, batch: int) -> None:
    """Drain the outbox with the plainest loop, when told to."""
    with servers.connect("bench-loop", autocommit=False) as connection, servers.redis() as client:
        connection.execute("SELECT 1")
        connection.commit()
        client.ping()
        _work(pipe, lambda: plain_loop(connection, client, batch))


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


def _work(pipe: Connection, drain: Callable[[], int]) -> None:
    """Say that all is ready, drain on the word, report, and stay until the server has been looked at."""
    pipe.send("ready")
    pipe.recv()
    started, cpu = time.perf_counter(), time.process_time()
    events = drain()
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    pipe.send(Work(events, seconds, cpu, _peak_bytes()))
    pipe.recv()


def _peak_bytes() -> int:
    """Return the most memory that this process has had resident."""
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):  # of this program; ru_maxrss on Linux may be of the one before it
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


WORKERS = {
    "relay": (relay_worker, "outbox-relay"),
    "loop": (loop_worker, "bench-loop"),
}


# -- one run ---------------------------------------------------------------------------------------


class Bench:
    """The servers of a benchmark, with the outbox's tables in a schema that goes when it ends."""

    def __init__(self, servers: Servers) -> None:
        self.servers = servers
        self.database = servers.connect()
        self.redis = servers.redis()

    def __enter__(self) -> Bench:
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
        self.database.execute("TRUNCATE outbox, outbox_journal, outbox_dead RESTART IDENTITY")
        self.database.execute("UPDATE outbox_relay SET batch = 0, asleep = false")
        self.redis.unlink(*LANES, *self.redis.scan_iter(STATE + ":*"))

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
        with _started(target, self.servers, batch) as (process, pipe):
            _receive(pipe, process)
            meter = Meter(self.database, self.redis, application)
            pipe.send("go")
            with self._progress(f"{who} publishes", events):
                work = _receive(pipe, process)
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
        return _ticking(lambda: f"{what}: {sum(self.redis.xlen(lane) for lane in LANES):,} of {events:,}")


class Meter:
    """The CPU that a run costs the servers, from now on."""

    def __init__(self, database: psycopg.Connection, client: redis.Redis, application: str) -> None:
        self._redis = client
        row = database.execute(
            "SELECT min(pid) FROM pg_stat_activity "
            "WHERE application_name = %s AND datname = current_database()",
            (application,),
        ).fetchone()
        self._backend = _local(row[0] if row else None)
        self._start = self._now()

    def run(self, who: str, work: Work) -> Run:
        """Return the run that ends now."""
        backend, postgres, server = (
            None if start is None or end is None else (end - start) / work.events * 1e6
            for start, end in zip(self._start, self._now(), strict=True)
        )
        assert server is not None
        return Run(
            who=who,
            events=work.events,
            seconds=work.seconds,
            rate=work.events / work.seconds,
            python_us=work.cpu_seconds / work.events * 1e6,
            backend_us=backend,
            postgres_us=postgres,
            redis_us=server,
            peak_mb=work.peak_bytes / 2**20,
        )

    def _now(self) -> tuple[float | None, float | None, float]:
        info = self._redis.info("cpu")
        server = info["used_cpu_user"] + info["used_cpu_sys"]
        try:
            backend = _cpu(self._backend) if self._backend else None
            postgres = _family_cpu(self._backend.parent()) if self._backend else None
        except psutil.Error:  # the connection was lost and opened anew
            backend = postgres = None
        return backend, postgres, server


def _local(pid: int | None) -> psutil.Process | None:
    """Return the backend's process, or None when it is on another machine."""
    try:
        process = psutil.Process(pid) if pid else None
        return process if process and "postgres" in process.name() else None
    except psutil.Error:
        return None


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _family_cpu(parent: psutil.Process | None) -> float | None:
    """Return what a process and its children have used, those that have ended included."""
    if parent is None:
        return None
    times = parent.cpu_times()
    ended = float(times.children_user + times.children_system)
    return ended + _cpu(parent) + sum(_cpu(child) for child in parent.children())


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


@contextlib.contextmanager
def _started(
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


def _receive(pipe: Connection, process: multiprocessing.process.BaseProcess) -> Any:
    try:
        return pipe.recv()
    except EOFError:
        process.join(timeout=5)
        raise Wrong(f"the worker ended with {process.exitcode}; see its traceback above") from None


@contextlib.contextmanager
def _ticking(text: Callable[[], str]) -> Iterator[None]:
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


# -- the benchmarks --------------------------------------------------------------------------------


def compare(bench: Bench, events: int, runs: int, batch: int) -> dict[str, Any]:
    """Run relay and loop in turn; show and return what came out."""
    console.print(f"\nbacklog of {events:,} events, batches of {batch}, {runs} pairs of runs")
    found: dict[str, list[Run]] = {"relay": [], "loop": []}
    for number in range(1, runs + 1):
        for who, done in found.items():
            done.append(bench.run(who, events, batch))
            console.print(f"  {number}/{runs} {_line(done[-1])}")
    return _report(events, batch, found, "relay", "loop")


def held_snapshot(bench: Bench, events: int, runs: int, batch: int) -> dict[str, Any]:
    """Run the relay undisturbed and beside an open transaction, in turn; show and return what came out."""
    console.print(f"\nbacklog of {events:,} events, {runs} pairs: a snapshot is held, or not")
    found: dict[str, list[Run]] = {"held": [], "undisturbed": []}
    for number in range(1, runs + 1):
        for who, done in found.items():
            with _snapshot(bench.servers) if who == "held" else contextlib.nullcontext():
                done.append(replace(bench.run("relay", events, batch), who=who))
            console.print(f"  {number}/{runs} {_line(done[-1])}")
    return _report(events, batch, found, "held", "undisturbed")


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
    with _started(latency_worker, bench.servers) as (process, pipe):
        _receive(pipe, process)
        time.sleep(2)  # until it sleeps
        arrived: dict[int, float] = {}
        reader = threading.Thread(target=_read, args=(bench.servers, count, arrived), daemon=True)
        reader.start()
        with _ticking(lambda: f"{len(arrived)} of {count} events have arrived"):
            committed = _commit_singly(bench.servers, count, per_second)
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


def latency_worker(pipe: Connection, servers: Servers) -> None:
    """Run the relay as the daemon does, until told to stop."""
    relay = Relay(servers.settings(500))
    relay.check()
    thread = threading.Thread(target=relay.run)
    thread.start()
    pipe.send("ready")
    pipe.recv()
    relay.stop.set()
    thread.join()


def _commit_singly(servers: Servers, count: int, per_second: float) -> dict[int, float]:
    """Commit one event at a time; return when each commit came back."""
    committed = {}
    with servers.connect("bench-writer", autocommit=False) as connection:
        start = time.perf_counter()
        for number in range(1, count + 1):
            time.sleep(max(0.0, start + number / per_second - time.perf_counter()))
            connection.execute(
                "INSERT INTO outbox (stream, type, key, payload) VALUES (%s, 'Booked', 'k', %s)",
                (STREAM, f'{{"n": {number}, "text": "one"}}'),
            )
            connection.commit()
            committed[number] = time.perf_counter()
    return committed


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


# -- what is shown ---------------------------------------------------------------------------------


def _line(run: Run) -> str:
    return f"{run.who:<11} {run.rate:>8,.0f} events/s   peak {run.peak_mb:.0f} MB"


def _report(events: int, batch: int, found: dict[str, list[Run]], ours: str, other: str) -> dict[str, Any]:
    """Print the table and the line of the ratio; return all of it."""
    table = Table(title=f"{events:,} events, batches of {batch}; CPU in microseconds an event")
    for heading in ("", "events/s", "spread", "Python", "backend", "PostgreSQL", "Redis", "peak MB"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for who, runs in found.items():
        table.add_row(who, *_row(runs))
    console.print(table)
    pairs = zip(found[ours], found[other], strict=True)
    ratios = [one.rate / two.rate for one, two in pairs]
    middle = statistics.median(ratios)
    console.print(
        f"ratio {middle:.2f}  ({ours} / {other}, median of {len(ratios)} pairs, "
        f"{min(ratios):.2f} to {max(ratios):.2f}, {events:,} events)"
    )
    return {
        "what": f"{ours} / {other}",
        "events": events,
        "batch": batch,
        "ratio": middle,
        "ratios": ratios,
        "runs": [asdict(run) for runs in found.values() for run in runs],
    }


def _row(runs: Sequence[Run]) -> list[str]:
    """Return the medians of some runs as cells of the table."""
    rates = [run.rate for run in runs]
    cells = [f"{statistics.median(rates):,.0f}", f"{min(rates):,.0f} to {max(rates):,.0f}"]
    for name in ("python_us", "backend_us", "postgres_us", "redis_us"):
        values = [getattr(run, name) for run in runs]
        cells.append("?" if None in values else f"{statistics.median(values):.1f}")
    return [*cells, f"{max(run.peak_mb for run in runs):.0f}"]


def about(bench: Bench) -> dict[str, Any]:
    """Return the versions, the machine and the date."""
    info = bench.redis.info("server")
    row = bench.database.execute(
        "SELECT current_setting('server_version'), current_setting('fsync'), "
        "current_setting('synchronous_commit'), current_setting('shared_buffers')"
    ).fetchone()
    assert row is not None
    name = info.get("server_name", "redis")
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": f"{os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB, "
        f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {package: _version(package) for package in PACKAGES},
        "postgresql": row[0].split()[0],
        "postgresql_settings": dict(
            zip(("fsync", "synchronous_commit", "shared_buffers"), row[1:], strict=True)
        ),
        name: info.get(f"{name}_version", info["redis_version"]),
        "redis_appendonly": bench.redis.config_get("appendonly").get("appendonly"),
    }


def _flat(facts: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for name, fact in facts.items():
        yield from fact.items() if isinstance(fact, dict) else [(name, fact)]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _save(facts: dict[str, Any], results: list[dict[str, Any]]) -> None:
    folder = Path(__file__).parent / "results"
    folder.mkdir(exist_ok=True)
    path = folder / f"relay-{facts['date'][:19].replace(':', '')}.json"
    path.write_text(json.dumps(facts | {"results": results}, indent=2) + "\n")
    console.print(f"written: {path.relative_to(folder.parent.parent)}")


# -- the command -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _servers(options: argparse.Namespace) -> Iterator[Servers]:
    """Give the servers that were named, or start some."""
    with contextlib.ExitStack() as stack:
        database, cache = options.database_url, options.redis_url
        database = database or stack.enter_context(testing.postgres(settings=DURABLE)).url
        cache = cache or stack.enter_context(testing.redis()).url
        yield Servers(database, cache)


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
    add("--database-url", help="a PostgreSQL to use, in a schema of its own")
    add("--redis-url", help="a Redis to use, with keys of its own")
    add("--save", action="store_true", help="write bench/results/relay-<date>.json")
    return parser.parse_args()


def _runs(options: argparse.Namespace) -> Iterator[tuple[int, int]]:
    """Yield each size of the backlog with its number of runs; the last number serves the rest."""
    for place, events in enumerate(options.events):
        yield events, options.runs[min(place, len(options.runs) - 1)]


def main() -> int:
    options = _options()
    with _servers(options) as servers, Bench(servers) as bench:
        facts = about(bench)
        console.print(", ".join(f"{name} {fact}" for name, fact in _flat(facts)))
        if options.latency:
            results = [latency(bench, options.seconds, options.per_second)]
        else:
            measure = held_snapshot if options.held_snapshot else compare
            for who in WORKERS:  # the first run of a fresh server is slower
                bench.run(who, 5000, options.batch)
            results = [measure(bench, *pair, options.batch) for pair in _runs(options)]
        if options.save:
            _save(facts, results)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Wrong as wrong:
        sys.exit(f"the run is not valid: {wrong}")
