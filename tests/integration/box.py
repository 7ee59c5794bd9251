"""An outbox in a test's hands: insert events by SQL, make relays, look at lanes, tables and state."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import psycopg
import redis as redis_client

from outbox.relay import Relay
from outbox.settings import Settings
from tests.roles import as_role


class Box:
    """One outbox and its Redis; `stream` defaults to "s", `data` to the event's name."""

    def __init__(self, database_url: str, redis_url: str) -> None:
        self.database_url, self.redis_url = database_url, redis_url
        self.sql = self.connect(autocommit=True)
        self.redis = redis_client.Redis.from_url(redis_url)
        self.relays: list[Relay] = []

    def connect(self, **options: Any) -> psycopg.Connection:
        return psycopg.connect(self.database_url.replace("+psycopg", ""), **options)

    def close(self) -> None:
        for relay in self.relays:
            relay.close()
        self.sql.close()
        self.redis.close()

    def relay(self, **settings: Any) -> Relay:
        """Make a relay; it is closed with the box. An event's retry comes at once unless set otherwise."""
        defaults = {
            "database_url": as_role(self.database_url, "relay"),
            "redis_url": self.redis_url,
            "backoff_seconds": 0.0,
            "backoff_max_seconds": 0.0,
        }
        relay = Relay(Settings(**(defaults | settings)))
        self.relays.append(relay)
        return relay

    def add(self, name: str, *, on: psycopg.Connection | None = None, **columns: Any) -> str:
        """Insert an event whose data is its name; return its id."""
        values = {"event_id": str(uuid4()), "stream": "s", "type": "T", "payload": json.dumps(name)} | columns
        names, holes = ", ".join(values), ", ".join(["%s"] * len(values))
        (on or self.sql).execute(f"INSERT INTO outbox ({names}) VALUES ({holes})", [*values.values()])
        return str(values["event_id"])

    def lane(self, name: str = "s") -> list[str]:
        """Return the names of the events in a lane, in order."""
        return [json.loads(entry[b"data"]) for _, entry in self.redis.xrange(name)]

    def waiting(self) -> list[str]:
        """Return the names of the events in the outbox, in the order of their ids."""
        return [row[0] for row in self.sql.execute("SELECT payload #>> '{}' FROM outbox ORDER BY id")]

    def value(self, query: str, *parameters: Any) -> Any:
        """Return the first column of the first row."""
        row = self.sql.execute(query, parameters).fetchone()
        return row[0] if row else None

    def batch(self) -> int:
        return int(self.value("SELECT batch FROM outbox_relay"))

    def state(self) -> dict[bytes, bytes]:
        """Return what Redis knows of the outbox."""
        keys = self.redis.keys("outbox:*")
        return self.redis.hgetall(keys[0]) if keys else {}

    def photograph(self) -> dict[bytes, bytes]:
        """Return the whole of Redis, to go back to."""
        return {key: self.redis.dump(key) for key in self.redis.scan_iter()}

    def go_back_to(self, photograph: dict[bytes, bytes]) -> None:
        """Make Redis forget what has come since, as a replica that was behind."""
        self.redis.flushdb()
        for key, value in photograph.items():
            self.redis.restore(key, 0, value)


def after(owner: Any, name: str, act: Any, times: int = 1) -> None:
    """Have `act()` called after the next calls of a method."""
    method, left = getattr(owner, name), times

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        result = method(*arguments, **named)
        left -= 1
        if left >= 0:
            act()
        return result

    setattr(owner, name, wrapped)


def before(owner: Any, name: str, act: Any, times: int = 1) -> None:
    """Have `act()` called before the next calls of a method."""
    method, left = getattr(owner, name), times

    def wrapped(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if left >= 0:
            act()
        return method(*arguments, **named)

    setattr(owner, name, wrapped)
