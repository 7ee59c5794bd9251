"""What a relay does beside its steps: purge the journal, trim the lanes, and say which lanes nobody reads."""

from __future__ import annotations

import logging
import time
from collections import defaultdict
from collections.abc import Callable

from outbox.errors import OutboxError, RedisUnavailable, Unavailable
from outbox.lanes import NO_PAUSE
from outbox.loop import Every, Stop
from outbox.priority import LOWEST
from outbox.settings import Settings
from outbox.store import Store, database_refused
from outbox.streams import Streams, memory_used, redis_refused

log = logging.getLogger("outbox.housekeeper")

TRIM_SECONDS = 10.0
PRESSURE_SECONDS = 1.0
SAY_AGAIN_SECONDS = 600.0  # that a chore fails


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
        self.pressure_again = Every(PRESSURE_SECONDS)
        self.pause = NO_PAUSE  # what the relay should leave in PostgreSQL for now
        self.lost: list[str] = []  # lanes that the relay should fill again, though nothing is published there
        self._seen: list[str] = []
        self._look_again, self._trim_again = Every(TRIM_SECONDS), Every(TRIM_SECONDS)
        self._unread: set[str] = set()  # lanes without a group when they were looked at last
        self._told: set[str] = set()
        self._say_again: defaultdict[str, Every] = defaultdict(lambda: Every(SAY_AGAIN_SECONDS))

    def run(self) -> None:
        """Keep house until stopped, each chore by itself, whatever becomes of the others. Blocks."""
        rest_seconds = min(PRESSURE_SECONDS, max(0.1, self._settings.journal_retention_seconds / 10))
        while not self._stop.is_set():
            if self.pressure_again.due():
                self._do_or_log("how full Redis is cannot be seen", self.look_at_pressure)
            purged = self._do_or_log("the journal cannot be purged", self.purge)
            if self._trim_again.due():
                self._do_or_log("the lanes cannot be trimmed", self.trim)
            if not purged:
                self._stop.wait(rest_seconds)
        self.close()

    def _do_or_log(self, failed: str, chore: Callable[[], int | None]) -> int | None:
        """Do a chore and return what it does; where it fails, say so now and then, and return None."""
        try:
            return chore()
        except OutboxError as error:
            if not _is_the_relays(error) and self._say_again[failed].due():
                log.warning("%s: %s", failed, error, extra={"action": "housekeeping_failed"})
        except Exception:
            if self._say_again[failed].due():
                log.exception("a bug of the housekeeper: %s", failed, extra={"action": "housekeeper_bug"})
        return None

    def purge(self) -> int:
        """Delete a few batches of the journal that are older than the retention; return how many.

        What Redis has not got, or has lost, is kept, however old: Redis may have been away for longer than the
        retention, and the next event of a lane that is gone may come in a day.
        """
        return self._store.purge(self._settings.journal_retention_seconds, self.look_for_lost())

    def look_for_lost(self) -> int:
        """Look which lanes Redis has lost; return the last batch that need not be kept for them, or for itself."""
        if not self._seen or self._look_again.due():
            self._seen = self._lanes()
        last, self.lost = self._streams.purgeable(self._store.outbox_id(), self._seen)
        return last

    def look_at_pressure(self) -> None:
        """Decide what the relay should leave in PostgreSQL, so that Redis does not fill up."""
        settings = self._settings
        entries = self._streams.lengths(self._lanes()) if settings.lane_max_entries else {}
        used, share = memory_used(self._streams.server()), settings.redis_memory_percent / 100
        pause = self._lane_rule.pause(entries, settings.lane_max_entries, used, share)
        if pause.waiting != self.pause.waiting:
            what = [f"priorities below {pause.floor}"] if pause.floor > LOWEST else []
            log.warning(
                "Redis has used %.0f %% of its memory; waiting in PostgreSQL: %s",
                100 * used, ", ".join([*what, *sorted(pause.lanes)]) or "nothing", extra={"action": "lanes_paused"},
            )  # fmt: skip
        self.pause = pause

    def trim(self) -> int:
        """Drop the old entries that all groups have finished, in each lane; return how many."""
        before_ms = int((time.time() - self._settings.stream_retention_seconds) * 1000)
        dropped, refused = 0, None
        for lane in self._lanes():
            try:
                dropped += self._trim_lane(lane, before_ms)
            except RedisUnavailable as error:  # one that we may not use must not hold up the others
                if not redis_refused(error):
                    raise
                refused = refused or error
        if refused:
            raise refused
        return dropped

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


def _is_the_relays(error: OutboxError) -> bool:
    """Return whether the relay meets an error, too, and reports it: a server is away, or must not be used.

    A refusal it may never meet, as it asks other things of the servers, and perhaps nothing at all for hours.
    """
    return isinstance(error, Unavailable) and not (database_refused(error) or redis_refused(error))
