"""From a stream's name and a priority to the lane: the key of a Redis Stream."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from outbox.priority import HIGHEST, LOWEST

# Letters, digits and what keys of Redis are made of by custom; braces are the hash tag of a Redis Cluster.
STREAM_NAME = re.compile(r"[A-Za-z0-9_.:{}/-]{1,200}")


BEYOND = HIGHEST + 1  # a floor that no priority reaches


class Pause(NamedTuple):
    """What waits in PostgreSQL for now, so that Redis does not fill up: priorities below `floor`, and `lanes`.

    The rest says what a lane is: a stream, with `suffix` for priorities below `threshold`.
    """

    floor: int = LOWEST
    lanes: tuple[str, ...] = ()
    threshold: int = LOWEST
    suffix: str = ""

    @property
    def waiting(self) -> tuple[int, tuple[str, ...]]:
        """What waits, without what a lane is."""
        return self.floor, self.lanes


NO_PAUSE = Pause()


@dataclass(frozen=True)
class Lanes:
    """Choose the lane: `priority >= threshold` goes to the primary stream, the rest to the backfill.

    With `on=False` there is one lane a stream, whatever the priority.
    """

    threshold: int = 0
    suffix: str = "backfill"
    on: bool = True

    def lane(self, stream: str, priority: int) -> str:
        """Return the key of the Redis Stream for an event of `stream` with this priority."""
        if self.on and priority < self.threshold:
            return f"{stream}:{self.suffix}"
        return stream

    def pause(self, entries: Mapping[str, int | None], most: int, used: float, share: float) -> Pause:
        """Return what should wait: backfill first, primary last.

        A backfill lane waits from `most` entries on, a primary one from twice that; 0 is no limit. All of backfill
        waits when Redis has `used` this `share` of its memory, everything halfway between that and all of it.
        """
        full = [
            lane
            for lane, count in sorted(entries.items())
            if most and (count or 0) >= (most if self.is_backfill(lane) else 2 * most)
        ]
        floor = LOWEST
        if used >= share:
            floor = BEYOND if used >= (1 + share) / 2 or not self.on else self.threshold
        return Pause(floor, tuple(full), self.threshold if self.on else LOWEST, f":{self.suffix}")

    def waits(self, lane: str, pause: Pause) -> bool:
        """Return whether events of a lane are to wait."""
        return lane in pause.lanes or pause.floor >= (self.threshold if self.is_backfill(lane) else BEYOND)

    def is_backfill(self, lane: str) -> bool:
        """Return whether a lane is a backfill one."""
        return self.on and lane.endswith(f":{self.suffix}")
