"""A trace of what a relay asks of its servers and is told, to hold against the model of the protocol."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any
from uuid import uuid4

from outbox.errors import InvalidSetting

log = logging.getLogger("outbox.trace")


class Trace:
    """Append a line of JSON an action to a file that several relays may share; with `off`, do nothing.

    What changes a server is written twice, before it is asked and after it has answered: a relay that is
    killed in between leaves open whether it took effect. A file that cannot be written ends the trace, not the relay.

    Raises InvalidSetting when it cannot be opened.
    """

    def __init__(self, path: str) -> None:
        try:
            # Unbuffered: a line is one write at the end of the file, whole among those of other relays.
            self._file = None if path == "off" else Path(path).open("ab", buffering=0)  # noqa: SIM115
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise InvalidSetting(f"OUTBOX_TRACE: {path!a} cannot be opened: {reason}") from None
        self._relay = uuid4().hex[:8]

    def __call__(self, action: str, **facts: Any) -> None:
        if self._file is not None:
            line = json.dumps({"relay": self._relay, "action": action} | facts, default=repr)
            try:
                self._file.write(line.encode() + b"\n")
            except OSError as error:
                log.error("the trace ends here: %s", error, extra={"action": "trace_ended"})
                self.close()

    def close(self) -> None:
        """Close the file; nothing is written any more."""
        if self._file is not None:
            self._file.close()
            self._file = None
