"""Run the daemon until it reaches a point of its step, in most cases for the third time, and kill it there by signal 9,
or by another signal whose name is given.

The points are methods of the product, wrapped from here: the product itself knows nothing of this.
"""

import os
import signal
import sys
import threading
from typing import Any

from redis.connection import Connection

from outbox import cli
from outbox.store import Store
from outbox.streams import Streams

POINTS: dict[str, tuple[type, str, str]] = {
    "in connecting": (Store, "_check", "after"),
    "after lock": (Store, "begin", "after"),
    "before claim": (Store, "claim", "before"),
    "after claim": (Store, "claim", "after"),
    "in the reply": (Connection, "read_response", "before"),
    "after claim ahead": (Store, "claim_ahead", "after"),
    "after publish": (Streams, "publish", "after"),
    "after journal": (Store, "record_batch", "after"),
    "after commit": (Store, "commit", "after"),
    "in adopt": (Store, "adopt", "after"),
    "in purge": (Store, "purge", "after"),
    "in look": (Streams, "look", "after"),
}
# Some are not reached three times by themselves; the first replies of Redis are to the greeting.
PASSES = {"in connecting": 1, "in adopt": 1, "in look": 1, "in purge": 1, "in the reply": 12}


def wrap(point: str, name_of_signal: str = "SIGKILL") -> None:
    owner, name, when = POINTS[point]
    method = getattr(owner, name)
    left = PASSES.get(point, 3)

    def pass_by() -> None:
        nonlocal left
        if (threading.current_thread() is threading.main_thread()) == (point == "in purge"):
            return  # the housekeeper has a thread and connections of its own
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.Signals[name_of_signal])

    def wrapped(*arguments: Any, **named: Any) -> Any:
        if when == "before":
            pass_by()
        result = method(*arguments, **named)
        if when == "after":
            pass_by()
        return result

    setattr(owner, name, wrapped)


if __name__ == "__main__":
    wrap(*sys.argv[1:])
    sys.argv[1:] = ["run"]
    cli.main()
