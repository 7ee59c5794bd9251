"""What arrived in lanes that are trimmed, and in a journal that is purged: collected as it comes."""

from __future__ import annotations

import threading
from contextlib import closing

import psycopg
import redis as redis_client

from outbox.streams import decode
from tests.acceptance.harness import LANES, Batch, Entry, entry_of

PAGE = 2000  # entries
NEWER = """
SELECT batch, extract(epoch FROM published_at)::float8, body FROM outbox_journal WHERE batch > %s ORDER BY batch
"""


class Collector:
    """All entries of the lanes, and all batches of the journal, though the servers keep them for a while only.

    `look` must be called more often than they are dropped.
    """

    def __init__(self, redis: redis_client.Redis, dsn: str) -> None:
        self.batches: list[Batch] = []
        self._redis, self._dsn = redis, dsn
        self._lanes: dict[str, dict[bytes, Entry]] = {lane: {} for lane in LANES}  # by entry id
        self._last_batch = 0
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return sum(map(len, self._lanes.values()))

    def lane(self, name: str) -> list[Entry]:
        """Return a lane as if nothing had been trimmed."""
        return [*self._lanes[name].values()]

    def look(self) -> None:
        """Collect what is new. Raises the errors of both drivers; what was collected until then is kept."""
        with self._lock:
            for lane, found in self._lanes.items():
                self._look_at(lane, found)
            self._look_at_journal()

    def doubt(self) -> None:
        """Read again what the lanes still have: Redis may have lost some of it. Raises the errors of the driver.

        What is older than a lane's first entry was trimmed, and not lost.
        """
        with self._lock:
            for lane, found in self._lanes.items():
                kept = self._redis.xrange(lane)
                while kept and found and moment(next(reversed(found))) >= moment(kept[0][0]):
                    found.popitem()
                found.update((entry_id, entry_of(fields)) for entry_id, fields in kept)

    def _look_at(self, lane: str, found: dict[bytes, Entry]) -> None:
        while True:
            last = next(reversed(found), b"0-0")
            page = self._redis.xrange(lane, min=b"(" + last, count=PAGE)
            found.update((entry_id, entry_of(fields)) for entry_id, fields in page)
            if len(page) < PAGE:
                break

    def _look_at_journal(self) -> None:
        with closing(psycopg.connect(self._dsn, autocommit=True)) as connection:
            for number, at, body in connection.execute(NEWER, (self._last_batch,)):
                events = [(event.event_id, event.priority) for event in decode(body)[1]]
                self.batches.append(Batch(at, events))
                self._last_batch = number


def moment(entry_id: bytes) -> tuple[int, int]:
    """Return an entry id as numbers, to be compared."""
    milliseconds, _, number = entry_id.partition(b"-")
    return int(milliseconds), int(number)
