"""What a relay does beside its steps: purge the journal, trim the lanes, and say which lanes nobody reads."""

from __future__ import annotations

import logging
import time

from outbox.errors import OutboxError
from outbox.lanes import LOWEST, NO_PAUSE
from outbox.loop import Every, Stop
from outbox.settings import Settings
from outbox.store import Store
from outbox.streams import Streams, memory_used

log = logging.getLogger("outbox.housekeeper")

TRIM_SECONDS = 10.0
PRESSURE_SECONDS = 1.0


class Housekeeper:
    """Keep an outbox small, on connections of its own, so that the relay never waits for it.

    Any number may run for one outbox.
    """

    def __init__(self, settings: Settings, stop: Stop) -> None:
        self._settings, self._stop = settings, stop
        self._store = Store(
            settings.database_url, schema=settings.schema, takeover_seconds=settings.takeover_seconds
        )
        self._streams = Streams(settings.redis_url, prefix=settings.redis_prefix)
        self._lane_rule = settings.lane_rule()
        self._pressure_again = Every(PRESSURE_SECONDS)
        self.pause = NO_PAUSE  # what the relay should leave in PostgreSQL for now
        self._trim_again = Every(TRIM_SECONDS)
        self._unread: set[str] = set()  # lanes without a group when they were looked at last
        self._told: set[str] = set()

    def run(self) -> None:
        """Keep house until stopped. Blocks; what ails a server is for the relay to report."""
        while not self._stop.is_set():
            purged = 0
            try:
                purged = self._store.purge(self._settings.journal_retention_seconds)
                if self._pressure_again.due():
                    self.look_at_pressure()
                if self._trim_again.due():
                    self.trim()
            except OutboxError:
                pass
            if not purged:
                self._stop.wait(
                    min(PRESSURE_SECONDS, max(0.1, self._settings.journal_retention_seconds / 10))
                )
        self.close()

    def look_at_pressure(self) -> None:
        """Decide what the relay should leave in PostgreSQL, so that Redis does not fill up."""
        settings = self._settings
        entries = self._streams.lengths(self._lanes()) if settings.lane_max_entries else {}
        used, share = memory_used(self._streams.server()), settings.redis_memory_percent / 100
        pause = self._lane_rule.pause(entries, settings.lane_max_entries, used, share)
        if pause[:2] != self.pause[:2]:
            what = [f"priorities below {pause.floor}"] if pause.floor > LOWEST else []
            log.warning(
                "Redis has used %.0f %% of its memory; waiting in PostgreSQL: %s",
                100 * used, ", ".join([*what, *sorted(pause.lanes)]) or "nothing", extra={"action": "lanes_paused"},
            )  # fmt: skip
        self.pause = pause

    def trim(self) -> int:
        """Drop the old entries that all groups have finished, in each lane; return how many."""
        before_ms = int((time.time() - self._settings.stream_retention_seconds) * 1000)
        return sum(self._trim_lane(lane, before_ms) for lane in self._lanes())

    def close(self) -> None:
        """Close both connections."""
        self._store.close()
        self._streams.close()

    def _lanes(self) -> list[str]:
        return self._streams.state(self._store.outbox_id())[1]

    def _trim_lane(self, lane: str, before_ms: int) -> int:
        dropped = 0
        while not self._stop.is_set():
            found = self._streams.trim(lane, before_ms, dry=self._settings.trim == "off")
            dropped += found.dropped
            if not found.dropped:
                self._note_readers(lane, unread=found.entries > 0 and not found.groups)
                break
        if dropped:
            log.info(
                "trimmed %d entries of %s that all groups have finished",
                dropped, lane, extra={"action": "lane_trimmed"},
            )  # fmt: skip
        return dropped

    def _note_readers(self, lane: str, unread: bool) -> None:
        """Say once that a lane has no group; not at the first look, when its consumers may be about to start."""
        if unread and lane in self._unread and lane not in self._told:
            self._told.add(lane)
            log.warning(
                "nobody reads %s: it has entries and no consumer group, so nothing of it is trimmed",
                lane, extra={"action": "lane_unread"},
            )  # fmt: skip
        (self._unread.add if unread else self._unread.discard)(lane)
        if not unread:
            self._told.discard(lane)
