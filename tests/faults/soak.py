"""A soak: mixed faults for a long time, at a steady rate of events, while nothing that lives long may grow.

    python -m tests.faults.soak --minutes 30 --rate 300 --seed 1

Two relays and two consumers with the inbox run as processes; one of each lasts as long as the run, and is frozen and
cut off, but not killed. Journal, lanes and inbox are purged meanwhile, so what arrives is collected as it comes.

Exits with 1 if an event was lost, repeated, out of order or passed over, if an effect was lost or came twice, or if
memory, descriptors, connections, tables or Redis did not stay flat (see `flat`), or if the machine was too slow.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from typing import Any, NamedTuple

import click
import psutil
import psycopg
import redis as redis_client
from sqlalchemy.exc import DBAPIError

from outbox import testing
from outbox.groups import DEAD
from outbox.report import Columns, Report, progress
from tests.acceptance.harness import (
    LANES,
    PATIENCE_SECONDS,
    STREAM,
    Entry,
    Pause,
    RelayProcess,
    passed_over,
    wait_until,
)
from tests.faults import flat
from tests.faults.collector import Collector, moment
from tests.faults.flat import Series
from tests.faults.mixed import FAULTS
from tests.faults.servers import ON_DISK
from tests.faults.table import spread
from tests.faults.trial import Outcome, Trial, answers, open_trial

RATE = 300  # events a second
LOOK_SECONDS, SAMPLE_SECONDS = 1.0, 5.0
MB = 1024 * 1024
# Over the last two thirds. Threads, and connections that come and go, leave holes in a consumer's heap: its allocators
# take some 2 MB more in half an hour, ever more slowly, though nothing more is in use.
CREEP_MB = {"relay": 1.0, "consumer": 3.0}
# Statistics do not outlive a crash, so a vacuum must be quicker than the next one.
POSTGRES = {"autovacuum_naptime": "5s", "autovacuum_vacuum_scale_factor": "0.05"}
REDIS = ON_DISK | {"auto-aof-rewrite-percentage": "100"}  # or a restart takes longer each time
LEAST_SECONDS = 20.0  # that an entry is kept: more than it takes to collect it
# A kill of PostgreSQL shows in a connection of the pool when it is used again.
GRACE_SECONDS = 5.0
BEHIND_SECONDS = 10.0  # that the service makes up for after an outage, and that consumers may be behind
NEARLY = 0.9  # of the rate must be reached
LAST_SECONDS = 600  # for what is left in the end
OUTAGES = (psycopg.Error, redis_client.RedisError, OSError)
EFFECTS = """
SELECT (SELECT count(*) FROM (SELECT event_id FROM movement EXCEPT SELECT event_id FROM effect) AS lost),
    (SELECT count(*) - count(DISTINCT event_id) FROM effect)
"""
SIZE = "SELECT pg_total_relation_size(%s)"
SESSIONS = "SELECT count(*) FROM pg_stat_activity WHERE backend_type = 'client backend'"


class Effects(NamedTuple):
    """What became of the committed events at the consumers."""

    lost: int
    twice: int


class Soak(Trial):
    """A trial that goes on under one fault after the other.

    `rate` is of events that commit, a second; `faults` are the names of those that happen. With `leaks` its
    consumers are a control. The journal is kept for `retention_seconds`, and a finished entry for half as long.
    """

    rate: float = RATE
    most_moves = 12  # so that the service leaves the machine to what is tried
    leaks = False
    faults: Sequence[str] = (*FAULTS,)
    retention_seconds = 120.0

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self.sql("CREATE TABLE effect (event_id uuid NOT NULL)")
        self.collector = Collector(self.redis, self._dsn)
        self.consumers: list[RelayProcess] = []
        self.series: list[Series] = []
        self.inflicted: dict[str, list[float]] = defaultdict(list)  # by fault: seconds to recover
        self.refused_commits = 0  # while PostgreSQL was down
        self.left = 0  # entries in the lanes, in the end
        self._excused_until = 0.0
        self._not_judged: list[tuple[float, float]] = []
        self._held_up: set[str] = set()  # as they were waiting when such a time began
        self._numbers = count(1)
        self._turn, self._turns = 0.0, threading.Lock()
        self._keeping_up = threading.Event()
        self._keeping_up.set()

    # -- the service --------------------------------------------------------------------------------------

    def _move_all(
        self, accounts: list[int], priorities: list[int], roll_back: bool = False, pause: Pause = None
    ) -> None:
        """Take turns, so that the rate is steady; a commit may fail while PostgreSQL is down.

        On a machine that is too slow the consumers set the pace: what waits for them is no leak.
        """
        self._keeping_up.wait()
        with self._turns:
            turn = self._turn
            self._turn = (
                max(turn, time.monotonic() - BEHIND_SECONDS) + len(accounts) * (not roll_back) / self.rate
            )
        time.sleep(max(0.0, turn - time.monotonic()))
        try:
            super()._move_all(accounts, priorities, roll_back, pause)
        except DBAPIError:
            if time.monotonic() > self._excused_until:
                raise
            self.refused_commits += 1

    @contextmanager
    def commits_may_fail(self) -> Iterator[None]:
        """Let commits fail while the block runs, and a little longer."""
        self._excused_until = float("inf")
        yield
        self._excused_until = time.monotonic() + GRACE_SECONDS

    # -- the processes ------------------------------------------------------------------------------------

    @contextmanager
    def consuming(self) -> Iterator[None]:
        """Keep two consumers running while the block runs; the first of them lasts."""
        self.consumers = [self._consumer("lasting"), self._consumer("other")]
        try:
            yield
        finally:
            for consumer in self.consumers:
                consumer.__exit__()

    def _consumer(self, name: str) -> RelayProcess:
        database_url, redis_url = self._relays_see
        told = {
            "database_url": database_url,
            "redis_url": redis_url,
            "name": name,
            "leaks": self.leaks,
            "inbox_margin_seconds": 1.5 * self.retention_seconds,
        }
        where = "tests.faults.soaked:consumer"
        return self.launch(["-m", "outbox.cli", "consume", where], {"SOAK": json.dumps(told)})

    def replace_consumer(self) -> None:
        """Kill the second consumer; every other time its successor has a new name."""
        self.consumers[1].__exit__()
        number = next(self._numbers)
        self.consumers[1] = self._consumer(f"new-{number}" if number % 2 else "other")

    # -- the run ------------------------------------------------------------------------------------------

    def run(self, seconds: float, effects: int = 0) -> tuple[Outcome, Effects]:
        """Let faults happen for so long, and until there are so many effects; return what was found in the end."""
        settings = {
            "journal_retention_seconds": self.retention_seconds,
            "stream_retention_seconds": max(LEAST_SECONDS, self.retention_seconds / 2),
        }
        with self.consuming():
            with self.under_load(relays=2, **settings):
                self.series = self._all_series()
                with self._watched(every_seconds=min(SAMPLE_SECONDS, seconds / 60)):
                    self._go_on(seconds, effects)
            outcome = self.judge(commits_may_fail=False, journal_is_whole=False)
            self.complain_unless(holds(self._all_consumed, LAST_SECONDS), "consumers are behind")
            self.left = sum(self.redis.xlen(lane) for lane in LANES)
            self.complain_unless(not self._dead_letters(), f"dead letters: {self._dead_letters()}")
            for consumer in self.consumers:
                consumer.process.terminate()
                status = consumer.wait_for_death()
                self.complain_unless(status == 0, f"a consumer ended with {status}")
        self.complain_of_processes()
        return outcome, Effects(*self.sql(EFFECTS)[0])

    def _go_on(self, seconds: float, effects: int) -> None:
        """Let one fault happen after the other: in each round all of them, in an order of its own."""
        until = time.monotonic() + seconds
        self.lasts(seconds / 20)
        while True:
            for name in self.chance.sample(self.faults, len(self.faults)):
                self.lasts(self.chance.uniform(0.2, min(6.0, seconds / 20)))
                if time.monotonic() >= until and self.sql("SELECT count(*) FROM effect")[0][0] >= effects:
                    return
                self._inflict(name)

    def _inflict(self, name: str) -> None:
        try:
            FAULTS[name](self)
            self.recoveries.clear()
            self.recovers()
            self.inflicted[name] += self.recoveries
            delivered = self._delivered()
        except (AssertionError, *OUTAGES) as error:
            self.complain_unless(False, f"{name}: {error!r}")
            return
        goes_on = holds(lambda: self._delivered() > delivered, PATIENCE_SECONDS)
        self.complain_unless(goes_on, f"{name}: nothing is consumed")
        for lasting in (self.relays[0], self.consumers[0]):
            self.complain_unless(lasting.process.poll() is None, f"{name}: a process has ended")
        self.done += 1

    def seconds(self) -> float:
        """Return the time from the first commit of the service to the last."""
        moments = self._committed_at.values()
        return max(moments) - min(moments)

    def entries(self) -> int:
        """Return how many entries have arrived in both lanes."""
        return len(self.collector)

    def restart_broker(self) -> None:
        """Start Redis again; blocks until it has read its log."""
        self.broker.restart()
        wait_until(lambda: quietly(self.redis.ping))

    def doubt(self) -> None:
        """Look again at what has arrived: Redis may have gone back in time."""
        wait_until(lambda: quietly(self.collector.doubt))

    def redis_stands(self) -> bool:
        """Return whether Redis has all that PostgreSQL says it was given."""
        outbox_id, batch = self.sql("SELECT outbox_id::text, batch FROM outbox_relay")[0]
        return int(self.redis.hget(f"outbox:{outbox_id}", "batch") or 0) >= batch

    def _delivered(self) -> tuple[int, int]:
        """Return the entry id of the newest primary entry that a consumer has been given."""
        groups = self.redis.xinfo_groups(STREAM)
        return max((moment(group["last-delivered-id"]) for group in groups), default=(0, 0))

    def _behind(self) -> int:
        """Return how many entries the consumers have not been given yet, as far as Redis can tell."""
        return sum(group["lag"] or 0 for lane in LANES for group in self.redis.xinfo_groups(lane))

    def _all_consumed(self) -> bool:
        return all(self._is_consumed(lane) for lane in LANES)

    def _is_consumed(self, lane: str) -> bool:
        newest, groups = self.redis.xrevrange(lane, count=1), self.redis.xinfo_groups(lane)
        delivered = all(not newest or newest[0][0] == group["last-delivered-id"] for group in groups)
        return bool(groups) and delivered and not any(group["pending"] for group in groups)

    def _dead_letters(self) -> int:
        """Return how many events the relay or the consumers have given up; none should be."""
        of_consumers = sum(self.redis.xlen(lane + DEAD) for lane in LANES)
        return self.sql("SELECT count(*) FROM outbox_dead")[0][0] + of_consumers

    # -- what is watched ----------------------------------------------------------------------------------

    @contextmanager
    def _watched(self, every_seconds: float) -> Iterator[None]:
        """Collect what arrives, and take a sample of everything now and then, while the block runs."""
        stop = threading.Event()
        thread = threading.Thread(target=self._watch, args=(stop, every_seconds))
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()
            self._keeping_up.set()

    def _watch(self, stop: threading.Event, every_seconds: float) -> None:
        due = 0.0
        while not stop.wait(min(LOOK_SECONDS, every_seconds)):
            quietly(self.collector.look)
            quietly(self._set_pace)
            if time.monotonic() >= due:
                due = time.monotonic() + every_seconds
                for series in self.series:
                    quietly(series.sample)

    def _set_pace(self) -> None:
        pace = self._keeping_up
        (pace.set if self._behind() < BEHIND_SECONDS * self.rate else pace.clear)()

    def _all_series(self) -> list[Series]:
        lasting = {"relay": self.relays[0], "consumer": self.consumers[0]}
        processes = {who: psutil.Process(process.process.pid) for who, process in lasting.items()}
        tables = ("outbox", "outbox_journal", "outbox_inbox")
        return [
            *(
                Series(f"{who}: memory", "MB", partial(memory, it), 0.05, 4, CREEP_MB[who])
                for who, it in processes.items()
            ),
            # Of a consumer that is busy, each worker has a second connection to Redis.
            *(Series(f"{who}: descriptors", "", it.num_fds, 0, 6, 0.5) for who, it in processes.items()),
            # After a cut all connections may be there twice for a moment.
            Series("PostgreSQL: sessions", "", lambda: self.sql(SESSIONS)[0][0], 0, 12, 0.5),
            Series(
                "Redis: connections", "", lambda: self.redis.info("clients")["connected_clients"], 0, 12, 0.5
            ),
            Series("Redis: memory", "MB", lambda: self.redis.info("memory")["used_memory"] / MB, 0.25, 2),
            *(Series(table, "MB", partial(self._size, table), 0.25, 1) for table in tables),
        ]

    def _size(self, table: str) -> float:
        return self.sql(SIZE, table)[0][0] / MB

    # -- the oracle ---------------------------------------------------------------------------------------

    @contextmanager
    def not_judged_by_priority(self) -> Iterator[None]:
        """Let events wait while the block runs, as those do that are refused, and others go before them."""
        started = time.time() - GRACE_SECONDS
        self._held_up |= {*self.waiting()}
        yield
        self._not_judged.append((started, time.time()))

    def passed_over(self) -> int:
        """Count the violations of priority that the journal has shown."""
        judged = {
            event_id: at
            for event_id, at in self._committed_at.items()
            if event_id not in self._held_up
            and not any(start <= at <= end for start, end in self._not_judged)
        }
        return passed_over(self.collector.batches, judged)

    def _lane(self, name: str) -> list[Entry]:
        wait_until(lambda: quietly(self.collector.look))
        return self.collector.lane(name)


def quietly(look: Callable[[], object]) -> bool:
    """Look at something, and return whether that was possible: a server may be down, or have cut us off."""
    try:
        look()
    except (psutil.Error, *OUTAGES):
        return False
    return True


def holds(condition: Callable[[], object], seconds: float) -> bool:
    """Wait for a condition, and return whether it came true in time."""
    try:
        wait_until(lambda: answers(condition), seconds=seconds)
    except AssertionError:
        return False
    return True


def memory(process: psutil.Process) -> float:
    return process.memory_info().rss / MB


class Verdict(NamedTuple):
    """What a soak has shown."""

    soak: Soak
    outcome: Outcome
    effects: Effects

    def wrong(self) -> dict[str, object]:
        """Return what should not be so."""
        wrong: dict[str, object] = dict(self.outcome.wrong())
        wrong |= {f"effects {name}": n for name, n in self.effects._asdict().items() if n}
        return wrong | {series.name: series.wrong() for series in self.soak.series if series.wrong()}

    def rate(self) -> float:
        """Return the events that committed, a second."""
        return self.outcome.findings.committed / self.soak.seconds()

    def report(self) -> Report:
        """Return the tables of it."""
        soak, (committed, published, *faults) = self.soak, self.outcome.findings
        names = ("lost", "repeated", "phantom", "out_of_order")
        facts = {
            "committed": f"{committed:,} events in {soak.seconds():,.0f} s, {self.rate():.0f} a second",
            "published": f"{published:,}, of which {soak.left:,} are left in the lanes",
            **dict(zip(names, faults, strict=True)),
            "passed_over": "-" if self.outcome.passed_over is None else self.outcome.passed_over,
            **{f"effects_{name}": n for name, n in self.effects._asdict().items()},
            "refused_commits": f"{soak.refused_commits}, while PostgreSQL was down",
            "in_the_logs": ", ".join(f"{name} {n:,}" for name, n in soak.said.most_common()) or "nothing",
        }
        inflicted = [(name, len(times), spread(times)) for name, times in sorted(soak.inflicted.items())]
        return Report(
            facts,
            [
                Columns("Faults", ("fault", "times", "back in, s: median / longest"), inflicted),
                Columns("What must stay flat", flat.HEADS, [series.cells() for series in soak.series]),
            ],
        )


def soak_for(
    seconds: float,
    *,
    rate: float = RATE,
    seed: int = 0,
    effects: int = 0,
    faults: Sequence[str] = (*FAULTS,),
    naive: bool = False,
    leaks: bool = False,
    watch: Callable[[Soak], None] = id,
) -> Verdict:
    """Run a soak on servers of its own; see `Soak.run`. `watch` is given it before it starts."""
    with open_trial(
        naive=naive, times=0, within=PATIENCE_SECONDS, seed=f"{seed} soak", postgres=POSTGRES, redis=REDIS,
        between="relays", kind=Soak,
    ) as soak:  # fmt: skip
        soak.rate, soak.leaks, soak.faults = rate, leaks, faults
        # So that the highest tide of the inbox, at four times the retention, is within the first third.
        soak.retention_seconds = max(LEAST_SECONDS, min(120.0, seconds / 15))
        watch(soak)
        return Verdict(soak, *soak.run(seconds, effects))


def progress_line(soak: Soak, started: float) -> str:
    """Say how far a soak has come."""
    minutes = (time.monotonic() - started) / 60
    now = ", ".join(
        f"{series.name} {series.values[-1]:.0f} {series.unit}".rstrip()
        for series in soak.series[:4]
        if series.values
    )
    return f"{minutes:5.1f} min, {soak.entries():,} events, {soak.done} faults; {now}; load {os.getloadavg()[0]:.0f}"


@contextmanager
def telling(say: Callable[[], str]) -> Iterator[None]:
    """Keep a line up to date on a terminal, and print one a minute elsewhere."""
    stop = threading.Event()

    def tell() -> None:
        while not stop.wait(60):
            click.echo(say(), err=True)

    with progress(say):
        thread = threading.Thread(target=tell)
        if not sys.stderr.isatty():
            thread.start()
        try:
            yield
        finally:
            stop.set()
            if thread.ident:
                thread.join()


@click.command()
@click.option("--minutes", type=float, default=30, show_default=True)
@click.option("--rate", type=float, default=RATE, show_default=True, help="events a second")
@click.option("--seed", type=int, help="repeat the faults of the run with this seed")
@click.option("--naive", is_flag=True, help="a control: a naive relay")
@click.option("--leaks", is_flag=True, help="a control: consumers that keep something of each event")
def main(minutes: float, rate: float, seed: int | None, naive: bool, leaks: bool) -> None:
    """Let mixed faults happen at a steady rate of events, and see that nothing is lost and nothing grows."""
    seed = random.randrange(1_000_000) if seed is None else seed
    where = f"seed {seed}, {testing.find_postgres().version()}, {testing.find_redis().version()}"
    click.echo(where, err=True)
    soaks: list[Soak] = []
    started = time.monotonic()
    with telling(lambda: progress_line(soaks[0], started) if soaks else "starting"):
        verdict = soak_for(minutes * 60, rate=rate, seed=seed, naive=naive, leaks=leaks, watch=soaks.append)
    Report({"run": where}).show()
    verdict.report().show()
    wrong = verdict.wrong()
    if verdict.rate() < NEARLY * rate:
        wrong["too slow"] = f"{verdict.rate():.0f} events a second"
    click.echo("; ".join(f"{name}: {what}" for name, what in wrong.items()) or "nothing lost, nothing grew")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
