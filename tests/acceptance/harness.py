"""A service that writes, relays that are killed, and an oracle that compares what committed with what arrived.

    with Harness(database_url, redis_url) as harness, harness.writing():
        with harness.relay() as relay:
            relay.wait_for(harness.entries)
            relay.kill()
    findings = harness.settle()

The writers use the public API: a transaction updates an account's row, which makes the writers of one key take
turns, and publishes what it did with the account's next number. Some transactions roll back on purpose. The same
harness runs the product and the naive relay of `naive.py`, so that a zero of the one means something.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, Self

import psycopg
import redis as redis_client
from sqlalchemy import create_engine, text
from sqlalchemy.orm import sessionmaker

from outbox import publish
from outbox.priority import Priority
from outbox.streams import decode

HERE = Path(__file__).parent
STREAM = "account"
LANES = (STREAM, f"{STREAM}:backfill")
KEYS = 30
PATIENCE_SECONDS = 60


class Entry(NamedTuple):
    """What the oracle needs of an event: its id, key, priority, and number within the key."""

    event_id: str
    key: str
    priority: int
    n: int


class Findings(NamedTuple):
    """What the oracle has found; all but the first two should be 0."""

    committed: int
    published: int
    lost: int
    repeated: int
    phantom: int
    out_of_order: int

    def faults(self) -> tuple[int, int, int, int]:
        """Return lost, repeated, phantom and out of order."""
        return self[2:]


def compare(committed: list[str], lanes: list[list[Entry]], elsewhere: list[str] = ()) -> Findings:
    """Compare the ids that committed with the entries of the lanes, and the ids that are dead letters."""
    seen = Counter(entry.event_id for lane in lanes for entry in lane)
    known = set(committed)
    return Findings(
        committed=len(committed),
        published=seen.total(),
        lost=len(known - seen.keys() - set(elsewhere)),
        repeated=seen.total() - len(seen),
        phantom=len(seen.keys() - known),
        out_of_order=sum(map(_reversals, lanes)),
    )


def _reversals(lane: list[Entry]) -> int:
    """Count the entries that come after a later one of their key and priority; a repetition is none."""
    last: dict[tuple[str, int], int] = {}
    found = 0
    for entry in lane:
        place = (entry.key, entry.priority)
        found += entry.n < last.get(place, 0)
        last[place] = max(entry.n, last.get(place, 0))
    return found


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Block until the condition holds; fail after a minute."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.01)


class RelayProcess:
    """A relay as a process of its own; what it logs is in `log`."""

    def __init__(self, arguments: list[str], environment: dict[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by __exit__
        self.process = subprocess.Popen(
            [sys.executable, *arguments], env=os.environ | environment, stderr=self._log
        )

    @property
    def log(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self._log.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def wait_for(self, count: Callable[[], int], more: int = 1) -> None:
        """Block until a count has grown by that much; fail at once when the relay has died."""
        start = count()

        def grown() -> bool:
            assert self.process.poll() is None, f"the relay has died; its log:\n{self.log}"
            return count() >= start + more

        wait_until(grown, f"{more} more")

    def wait_for_death(self) -> int:
        """Block until the process has ended by itself; return its status (-9: killed by signal 9)."""
        try:
            return self.process.wait(PATIENCE_SECONDS)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the relay lives on; its log:\n{self.log}") from None


class Harness:
    """One outbox with its service, its relays and its oracle."""

    def __init__(self, database_url: str, redis_url: str) -> None:
        self._database_url, self._redis_url = database_url, redis_url
        self._engine = create_engine(database_url)
        self._sessions = sessionmaker(self._engine)
        self._committed: list[str] = []
        self._plain = psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True)
        self.redis = redis_client.Redis.from_url(redis_url)
        self._plain.execute("CREATE TABLE account (id text PRIMARY KEY, n bigint NOT NULL DEFAULT 0)")
        self._plain.execute(
            "INSERT INTO account (id) SELECT 'a' || n FROM generate_series(1, %s) AS n", (KEYS,)
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._plain.close()
        self._engine.dispose()
        self.redis.close()

    # -- the service ------------------------------------------------------------------------------------

    @contextmanager
    def writing(self, writers: int = 3, seed: int = 0) -> Iterator[None]:
        """Keep that many threads writing while the block runs."""
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._write, args=(random.Random(seed + n), stop)) for n in range(writers)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _write(self, chance: random.Random, stop: threading.Event) -> None:
        while not stop.is_set():
            with self._sessions() as session:
                accounts = sorted(chance.sample(range(1, KEYS + 1), chance.randint(1, 5)))
                ids = [self._move(session, f"a{n}", chance.choice([*Priority])) for n in accounts]
                if chance.random() < 0.05:
                    session.rollback()
                else:
                    session.commit()
                    self._committed += ids

    def _move(self, session, account: str, priority: int) -> str:
        update = text("UPDATE account SET n = n + 1 WHERE id = :id RETURNING n")
        moved = {"n": session.execute(update, {"id": account}).scalar_one()}
        return str(publish(session, moved, type="Moved", stream=STREAM, key=account, priority=priority))

    # -- the relays -------------------------------------------------------------------------------------

    def relay(self, die_at: str | None = None, naive: bool = False, **settings: object) -> RelayProcess:
        """Start a relay: the daemon, or the naive one; with `die_at` it kills itself at a point of its step."""
        environment = {
            "OUTBOX_DATABASE_URL": self._database_url,
            "OUTBOX_REDIS_URL": self._redis_url,
            "OUTBOX_BATCH_SIZE": "50",
        } | {f"OUTBOX_{name.upper()}": str(value) for name, value in settings.items()}
        if naive:
            return RelayProcess([str(HERE / "naive.py"), *([die_at] if die_at else [])], environment)
        if die_at:
            return RelayProcess([str(HERE / "die_at.py"), die_at], environment)
        return RelayProcess(["-m", "outbox.cli", "run"], environment)

    def entries(self) -> int:
        """Return the number of entries in both lanes."""
        return sum(self.redis.xlen(lane) for lane in LANES)

    # -- the oracle -------------------------------------------------------------------------------------

    def settle(self, naive: bool = False) -> Findings:
        """Let a last relay publish what is left, and compare. The writers must have stopped."""
        with self.relay(naive=naive):
            wait_until(lambda: self._pending() == 0, "an empty outbox")
        dead = [row[0] for row in self._plain.execute("SELECT event_id::text FROM outbox_dead")]
        return compare(self._committed, [self._lane(name) for name in LANES], dead)

    def journal_is_right(self) -> bool:
        """Return whether the journal, if nothing of it was purged, tells what is in each lane, in order."""
        told: dict[str, list[str]] = {lane: [] for lane in LANES}
        for (body,) in self._plain.execute("SELECT body FROM outbox_journal ORDER BY batch"):
            for event in decode(body)[1]:
                told[event.stream].append(event.event_id)
        return all(told[name] == [entry.event_id for entry in self._lane(name)] for name in LANES)

    def _pending(self) -> int:
        row = self._plain.execute("SELECT count(*) FROM outbox").fetchone()
        return row[0] if row else 0

    def _lane(self, name: str) -> list[Entry]:
        return [
            Entry(
                entry[b"id"].decode(),
                entry[b"subject"].decode(),
                int(entry[b"priority"]),
                json.loads(entry[b"data"])["n"],
            )
            for _, entry in self.redis.xrange(name)
        ]
