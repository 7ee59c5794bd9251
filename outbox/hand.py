"""What one process of a consumer has in hand: entries that Redis has given it, and that are not acked yet."""

from __future__ import annotations

import heapq
import itertools
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence

from outbox.groups import Entry

MOST_WAITING = (
    10_000  # entries to be tried again of primary or backfill: with more, nothing new is read there
)

_numbers = itertools.count(1)
# Until a time of the monotonic clock; those of one time in the order of number, lane and id. One entry may be there
# twice, when it was somebody else's for a while; as entries have no order, one more number decides.
Waiting = tuple[float, int, str, str, int, Entry]


class Hand:
    """What this process has in hand, shared by its workers and its keeper; no method blocks."""

    def __init__(self, idle_seconds: float, is_primary: Callable[[str], bool]) -> None:
        self._sure_seconds = idle_seconds / 2
        self._is_primary = is_primary
        self._lock = threading.Lock()
        self._held: dict[str, dict[str, None]] = defaultdict(dict)
        self._fresh: deque[Entry] = deque()
        self._again: dict[bool, list[Waiting]] = {True: [], False: []}  # heaps, by: of a primary lane
        self._adopted_at = 0.0  # by the monotonic clock
        self.renewed_at = 0.0

    def read(self, entries: Sequence[Entry]) -> Entry | None:
        """Hold entries that were delivered for the first time: return the first, and keep the others for anybody.

        One that is in hand already was taken up as pending by another worker, just after its delivery. When it has
        been on the way for long, or others have been taken up meanwhile, it may be somebody else's by now, or done:
        it is delivered once more, which finds out.
        """
        with self._lock:
            new = [entry for entry in entries if entry.id not in self._held[entry.lane]]
            late = max(self._adopted_at, time.monotonic() - self._sure_seconds)
            for entry in new:
                self._held[entry.lane][entry.id] = None
                if entry.since <= late:
                    self._push(0.0, next(_numbers), Entry(entry.lane, entry.id, {}, 0))
            new = [entry for entry in new if entry.since > late]
            self._fresh.extend(new[1:])
            return new[0] if new else None

    def primary(self) -> Entry | None:
        """Return the next entry of primary that is in hand: one whose time has come, or else one that was read."""
        return (self._again[True] and self.due(primary=True)) or self.fresh()

    def fresh(self) -> Entry | None:
        """Return the first entry of those that were read."""
        try:
            return self._fresh.popleft()
        except IndexError:
            return None

    def line_up(self) -> None:
        """Have what was read handled before what is adopted from now on: it is older."""
        with self._lock:
            while entry := self.fresh():
                self._push(0.0, next(_numbers), entry)

    def adopt(self, lane: str, ids: Iterable[str]) -> None:
        """Hold pending entries that nobody in this process has in hand, to be delivered at once."""
        with self._lock:
            for id_ in ids:
                if id_ not in self._held[lane]:
                    self._adopted_at = time.monotonic()
                    self._held[lane][id_] = None
                    self._push(0.0, next(_numbers), Entry(lane, id_, {}, 0))

    def retry(self, entry: Entry, at: float) -> None:
        """Have an entry delivered once more at a time."""
        with self._lock:
            self._push(at, next(_numbers), Entry(entry.lane, entry.id, {}, 0))

    def put_back(self, entry: Entry, at: float = 0.0) -> None:
        """Take back what could not be handled, through no fault of its own; by default it is the next."""
        with self._lock:
            self._push(at, 0, entry)

    def due(self, primary: bool) -> Entry | None:
        """Return an entry whose time has come."""
        heap = self._again[primary]
        if not heap:
            return None
        with self._lock:
            return heapq.heappop(heap)[-1] if heap and heap[0][0] <= time.monotonic() else None

    def next_at(self) -> float:
        """Return the earliest time at which an entry is to be handled again."""
        with self._lock:
            return min((heap[0][0] for heap in self._again.values() if heap), default=float("inf"))

    def surely_ours(self, entry: Entry, now: float) -> bool:
        """Return whether an entry was delivered, and cannot have been claimed by another consumer by now.

        It may have been when this process was frozen, or Redis was away, for longer than the heartbeat.
        """
        sure = now - max(entry.since, self.renewed_at) < self._sure_seconds
        return sure and entry.deliveries > 0 and entry.id in self._held[entry.lane]

    def drop(self, lane: str, ids: Iterable[str]) -> None:
        """Forget entries: they are acked, or not ours any more."""
        with self._lock:
            for id_ in ids:
                self._held[lane].pop(id_, None)

    def held(self) -> dict[str, list[str]]:
        """Return the entry ids in hand, by lane."""
        with self._lock:
            return {lane: list(ids) for lane, ids in self._held.items() if ids}

    def is_full(self, primary: bool) -> bool:
        """Return whether so much is to be tried again that nothing new should be read of these lanes."""
        return len(self._again[primary]) >= MOST_WAITING

    def _push(self, at: float, number: int, entry: Entry) -> None:
        waiting = (at, number, entry.lane, entry.id, next(_numbers), entry)
        heapq.heappush(self._again[self._is_primary(entry.lane)], waiting)
