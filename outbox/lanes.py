"""From a stream's name and a priority to the lane: the key of a Redis Stream."""

from __future__ import annotations

import re
from dataclasses import dataclass

# Letters, digits and what keys of Redis are made of by custom; braces are the hash tag of a Redis Cluster.
STREAM_NAME = re.compile(r"[A-Za-z0-9_.:{}/-]{1,200}")


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
