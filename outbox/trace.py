"""A trace of what a relay asks of its servers and is told, to hold against the model of the protocol."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from uuid import uuid4


class Trace:
    """Append a line of JSON an action to a file that several relays may share; with `off`, do nothing.

    What changes a server is written twice, before it is asked and after it has answered: a relay that is
    killed in between leaves open whether it took effect.
    """

    def __init__(self, path: str) -> None:
        # Unbuffered: a line is one write at the end of the file, whole among those of other relays.
        self._file = None if path == "off" else Path(path).open("ab", buffering=0)  # noqa: SIM115
        self._relay = uuid4().hex[:8]

    def __call__(self, action: str, **facts: Any) -> None:
        if self._file is not None:
            line = json.dumps({"relay": self._relay, "action": action} | facts, default=repr)
            self._file.write(line.encode() + b"\n")

    def close(self) -> None:
        """Close the file; nothing is written any more."""
        if self._file is not None:
            self._file.close()
            self._file = None
