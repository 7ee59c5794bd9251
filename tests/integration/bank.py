"""A service that reacts to events, in a test's hands: entries as the relay writes them, and consumers of three kinds.

A `Bank` makes consumers whose handler notes what it was given, in memory and as a row of the table `effect`. A test
says once what a handler does; the bank makes it a function or a coroutine function, as its kind needs, so that
every test holds for all kinds.
"""

from __future__ import annotations

import asyncio
import inspect
import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from uuid import uuid4

import psycopg
import redis as redis_client
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import sessionmaker

from outbox import AsyncConsumer, Consumer

KINDS = ("blocking", "asyncio", "blocking, async handlers")
PATIENCE_SECONDS = 30


def wait_until(condition: Callable[[], object], what: str = "the condition") -> None:
    """Block until the condition holds; fail after half a minute."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not come true"
        time.sleep(0.005)


class Bank:
    """Entries of the lanes, consumers of one kind, and what their handlers have done."""

    def __init__(self, database_url: str, redis_url: str, kind: str) -> None:
        self.kind, self.redis_url, self.database_url = kind, redis_url, database_url
        self.redis = redis_client.Redis.from_url(redis_url)
        self.handled: list[str] = []
        self._closers: list[Callable[[], object]] = []
        self._sql: psycopg.Connection | None = None

    def close(self) -> None:
        for close in reversed(self._closers):
            close()
        self.redis.close()

    # -- entries ------------------------------------------------------------------------------------------

    def add(self, name: str, lane: str = "s", **fields: Any) -> str:
        """Add an event whose data is its name, as the relay does; return its entry id."""
        return self.redis.xadd(lane, entry(name, lane, **fields)).decode()

    def pending(self, lane: str = "s", group: str = "g") -> dict[str, int]:
        """Return the names of pending entries, and how often each was delivered."""
        rows = self.redis.xpending_range(lane, group, "-", "+", 1000)
        return {self._name(lane, row["message_id"]): row["times_delivered"] for row in rows}

    def dead(self, lane: str = "s") -> list[dict[str, str]]:
        """Return the fields of the dead letters of a lane."""
        return [
            {name.decode(errors="replace"): value.decode(errors="replace") for name, value in fields.items()}
            for _, fields in self.redis.xrange(f"{lane}:dlq")
        ]

    def consumers(self, lane: str = "s") -> set[str]:
        """Return the names of the group's consumers."""
        return {info["name"].decode() for info in self.redis.xinfo_consumers(lane, "g")}

    def _name(self, lane: str, id_: bytes) -> str:
        found = self.redis.xrange(lane, id_, id_)
        return json.loads(found[0][1][b"data"]) if found else "(deleted)"

    # -- the service's own database -----------------------------------------------------------------------

    @property
    def sql(self) -> psycopg.Connection:
        if self._sql is None:
            url = self.database_url.replace("+psycopg", "")
            self._sql = psycopg.connect(url, autocommit=True)
            self._closers.append(self._sql.close)
            self._sql.execute("CREATE TABLE IF NOT EXISTS effect (name text NOT NULL)")
        return self._sql

    def effects(self) -> list[str]:
        """Return the names of the events whose handler has committed, sorted."""
        return sorted(row[0] for row in self.sql.execute("SELECT name FROM effect"))

    def _sessions(self) -> Any:
        _ = self.sql
        if self.kind == "asyncio":
            engine = create_async_engine(self.database_url)
            self._closers.append(engine.sync_engine.dispose)
            return async_sessionmaker(engine)
        engine = create_engine(self.database_url)
        self._closers.append(engine.dispose)
        return sessionmaker(engine)

    # -- consumers ----------------------------------------------------------------------------------------

    def consumer(
        self, act: Callable[..., Any] | None = None, *, inbox: bool = False, on: Any = None, **options: Any
    ) -> Made:
        """Make a consumer of the stream "s" in the group "g", whose handler notes the event and then calls `act`.

        `act` gets the event, and with `inbox` the session; what it returns in the blocking kinds is ignored.
        """
        options = {"group": "g", "streams": ["s"]} | options
        if inbox:
            options["sessions"] = self._sessions()
        cls = AsyncConsumer if self.kind == "asyncio" else Consumer
        made = Made(cls(self.redis_url, **options))
        handler = self._handler(act, inbox)
        made.it.on_any(handler) if on is None else made.it.on(on)(handler)
        self._closers.append(made.end)
        return made

    def _handler(self, act: Callable[..., Any] | None, inbox: bool) -> Callable[..., Any]:
        def note(event: Any, *session: Any) -> None:
            self.handled.append(event.data if isinstance(event.data, str) else event.type)
            for one in session:
                one.execute(text("INSERT INTO effect VALUES (:name)"), {"name": self.handled[-1]})
            if act is not None:
                act(event, *session)

        async def note_async(event: Any) -> None:
            await asyncio.sleep(0)
            await asyncio.to_thread(note, event) if self.kind == "asyncio" else note(event)

        async def note_session(event: Any, session: Any) -> None:
            await asyncio.sleep(0)
            if self.kind == "asyncio":
                await session.run_sync(lambda sync: note(event, sync))
            else:
                note(event, session)

        def note_with(event: Any, session: Any) -> None:
            note(event, session)

        def note_without(event: Any) -> None:
            note(event)

        if self.kind == "blocking":
            return note_with if inbox else note_without
        return note_session if inbox else note_async


class Made:
    """A consumer of any kind, driven by blocking calls; an asyncio one has a loop of its own."""

    def __init__(self, consumer: Any) -> None:
        self.it = consumer
        self._runner = asyncio.Runner()
        self._threads: list[threading.Thread] = []

    def run_once(self) -> int:
        return self._finish(self.it.run_once())

    def drain(self) -> int:
        return self._finish(self.it.drain())

    def run(self) -> None:
        self._finish(self.it.run())

    def close(self) -> None:
        self._finish(self.it.close())

    @contextmanager
    def running(self) -> Iterator[None]:
        """Run the consumer in a thread while the block runs, and stop it from this one."""
        thread = threading.Thread(target=self.run)
        self._threads.append(thread)
        thread.start()
        try:
            yield
        finally:
            self.it.stop()
            thread.join(PATIENCE_SECONDS)
            assert not thread.is_alive(), "the consumer does not stop"

    def end(self) -> None:
        if not any(thread.is_alive() for thread in self._threads):
            self.close()
            self._runner.close()

    def _finish(self, result: Any) -> Any:
        return self._runner.run(result) if inspect.iscoroutine(result) else result


def entry(name: str, lane: str = "s", **fields: Any) -> dict[str, Any]:
    """Return the fields of an event whose data is its name."""
    own = {
        "specversion": "1.0",
        "id": str(uuid4()),
        "source": "test",
        "type": "T",
        "time": "2026-01-31T12:00:00.123456Z",
        "datacontenttype": "application/json",
        "priority": -100 if lane.endswith(":backfill") else 0,
        "data": json.dumps(name),
    }
    return own | fields
