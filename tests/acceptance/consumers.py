"""Consumers that are killed, and the table that tells how often each event took effect.

    with Consumers(database_url, redis_url) as consumers, consumers.publishing():
        with consumers.start("one") as process:
            process.wait_for(consumers.effects)
            process.kill()
    findings = consumers.settle()

Run as a program it is one consumer, told by its environment what it is: with the inbox or without, or the control
that acks before it handles; and at which point of an event it kills itself. A handler inserts a row with its event's
name, the consumer's name and the delivery; the table takes the same event as often as it comes.
"""

from __future__ import annotations

import json
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NamedTuple, Self
from uuid import uuid4

import psycopg
import redis as redis_client
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker

import outbox.consumer
from outbox import Consumer
from outbox.groups import Groups
from outbox.inbox import Inbox
from tests.acceptance.harness import RelayProcess, wait_until

LANES = ("s", "s:backfill")
CLAIM_IDLE = timedelta(seconds=2)
AHEAD = 500  # events that may wait for the consumers

# Where a consumer kills itself, when it comes there for the third time, or the first with something claimed.
POINTS = {
    "after a read": (Groups, "next", "after"),
    "after the note": (Inbox, "_execute", "after"),
    "in the handler": None,
    "before the commit": (Session, "commit", "before"),
    "between commit and ack": (Session, "commit", "after"),
    "after the ack": (Groups, "ack", "after"),
    "in the claim": (Groups, "claim", "after"),
    "after a take": (Groups, "take", "after"),
    "after an ask": (Groups, "ask", "after"),
}


class Findings(NamedTuple):
    """What became of the events; with the inbox `lost` and `repeated` are 0."""

    published: int
    applied: int
    lost: int
    repeated: int
    dead: int


class Consumers:
    """Two lanes, a table of effects, and the processes that join them."""

    def __init__(self, database_url: str, redis_url: str) -> None:
        self._environment = {"DATABASE_URL": database_url, "REDIS_URL": redis_url}
        self.redis = redis_client.Redis.from_url(redis_url)
        self.sql = psycopg.connect(database_url.replace("+psycopg", ""), autocommit=True)
        self.sql.execute("CREATE TABLE effect (name text, consumer text, delivery int)")
        self._published: list[str] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.sql.close()
        self.redis.close()

    # -- events -------------------------------------------------------------------------------------------

    def publish(self, count: int, lane: str = "s", start: str = "e") -> None:
        """Add that many events to a lane, at once."""
        with self.redis.pipeline() as pipeline:
            for _ in range(count):
                name = f"{start}{len(self._published)}"
                self._published.append(name)
                priority = -100 if lane.endswith(":backfill") else 0
                fields = {"id": str(uuid4()), "type": "T", "priority": priority, "data": json.dumps(name)}
                pipeline.xadd(lane, fields)
            pipeline.execute()

    @contextmanager
    def publishing(self) -> Iterator[None]:
        """Keep adding to both lanes, never far ahead of the consumers, while the block runs."""
        stop = threading.Event()

        def add() -> None:
            chance = random.Random(3)
            while not stop.wait(0.01):
                if len(self._published) - self._done() < AHEAD:
                    self.publish(chance.randint(1, 40), chance.choice(LANES))

        thread = threading.Thread(target=add)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def leave(self, count: int, name: str) -> None:
        """Have so many entries read, and left pending, by a consumer that is dead."""
        with suppress(redis_client.ResponseError):
            self.redis.xgroup_create("s", "g", "0")
        assert len(self.redis.xreadgroup("g", name, {"s": ">"}, count)[0][1]) == count

    def _done(self) -> int:
        return int(self.redis.get("effects") or 0)

    # -- processes ----------------------------------------------------------------------------------------

    def start(self, name: str, kind: str = "inbox", die_at: str = "", **options: Any) -> RelayProcess:
        """Start a consumer: of the product, with "inbox" or "none", or the control that acks first ("early")."""
        told = {"name": name, "kind": kind, "die_at": die_at} | options
        return RelayProcess(
            ["-m", "tests.acceptance.consumers"], self._environment | {"CONSUMER": json.dumps(told)}
        )

    # -- the oracle ---------------------------------------------------------------------------------------

    def effects(self) -> int:
        """Return how many effects there are."""
        return self._value("SELECT count(*) FROM effect")

    def settled(self) -> bool:
        """Return whether nothing is pending, and nothing waits, in either lane."""
        for lane in LANES:
            for group in self.redis.xinfo_groups(lane) if self.redis.exists(lane) else ():
                newest = self.redis.xrevrange(lane, count=1)
                unread = newest and newest[0][0] != group["last-delivered-id"]
                if group["pending"] or unread:
                    return False
        return True

    def unread(self, lane: str) -> bool:
        """Return whether there is an entry that was never delivered."""
        newest = self.redis.xrevrange(lane, count=1)
        return any(newest[0][0] != group["last-delivered-id"] for group in self.redis.xinfo_groups(lane))

    def settle(self, kind: str = "inbox") -> Findings:
        """Let a last consumer finish, and compare. Nothing may be published any more."""
        with self.start("last", kind):
            wait_until(lambda: self.redis.exists(*LANES) and self.settled(), "empty lanes")
        applied = [row[0] for row in self.sql.execute("SELECT name FROM effect")]
        dead = sum(self.redis.xlen(f"{lane}:dlq") for lane in LANES)
        return Findings(
            published=len(self._published),
            applied=len(applied),
            lost=len(set(self._published) - set(applied)),
            repeated=len(applied) - len(set(applied)),
            dead=dead,
        )

    def _value(self, query: str) -> int:
        row = self.sql.execute(query).fetchone()
        return row[0] if row else 0


# -- the process ------------------------------------------------------------------------------------------


def main() -> None:
    told = json.loads(os.environ["CONSUMER"])
    sessions = sessionmaker(create_engine(os.environ["DATABASE_URL"]))
    counter = redis_client.Redis.from_url(os.environ["REDIS_URL"])
    passes = die_at(told["die_at"])
    if told["die_at"] == "after an ask":
        outbox.consumer.PREFETCH_SECONDS = 3600.0  # it reads ahead, however slow its handlers are
    poison = told.get("poison")

    def apply(event: Any, session: Any) -> None:
        values = {"name": event.data, "consumer": told["name"], "delivery": event.deliveries}
        session.execute(text("INSERT INTO effect VALUES (:name, :consumer, :delivery)"), values)
        counter.incr("effects")
        if event.data == poison:
            os.kill(os.getpid(), signal.SIGKILL)
        if event.data == told.get("freeze"):
            os.kill(os.getpid(), signal.SIGSTOP)
        if told["die_at"] == "in the handler":
            passes()

    def apply_alone(event: Any) -> None:
        with sessions() as session:
            apply(event, session)
            session.commit()

    if told["kind"] == "early":
        acks_first(told["name"], apply_alone)
        return
    consumer = Consumer(
        os.environ["REDIS_URL"],
        group="g",
        streams=["s"],
        name=told["name"],
        sessions=sessions if told["kind"] == "inbox" else None,
        claim_idle=CLAIM_IDLE,
        concurrency=told.get("concurrency", 1),
        max_deliveries=told.get("max_deliveries", 1000),
    )
    consumer.on_any(apply if told["kind"] == "inbox" else apply_alone)
    consumer.run()


def die_at(point: str, by: str = "SIGKILL") -> Any:
    """Have this process get a signal at a point; return what is to be called in the handler."""
    left = 1 if point == "in the claim" else 3

    def passes() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.Signals[by])

    if place := POINTS.get(point):
        owner, name, when = place
        method = getattr(owner, name)

        def commit(*arguments: Any, **named: Any) -> Any:
            if when == "before":
                passes()
            result = method(*arguments, **named)
            if when == "after":
                passes()
            return result

        async def awaited(*arguments: Any, **named: Any) -> Any:
            result = await method(*arguments, **named)
            if name != "claim" or result.ids:
                passes()
            return result

        setattr(owner, name, commit if owner is Session else awaited)
    return passes


def acks_first(name: str, handle: Any) -> None:
    """The control: a consumer that acks what it reads, and then handles it."""
    client = redis_client.Redis.from_url(os.environ["REDIS_URL"])
    for lane in LANES:
        with suppress(redis_client.ResponseError):
            client.xgroup_create(lane, "g", "0", mkstream=True)
    while True:
        for lane, entries in client.xreadgroup("g", name, dict.fromkeys(LANES, ">"), count=50, block=100):
            client.xack(lane, "g", *(id_ for id_, _ in entries))
            for _, fields in entries:
                handle(Early(json.loads(fields[b"data"]), 1))


class Early(NamedTuple):
    """What the control knows of an event."""

    data: str
    deliveries: int


if __name__ == "__main__":
    main()
