"""One tree of errors. Drivers' errors are translated where they are raised."""

from datetime import timedelta


class OutboxError(Exception):
    """Raised when anything in this package goes wrong; the root of the tree."""


class InvalidEvent(OutboxError, ValueError):
    """Raised when an event cannot be recorded. The message names the field; no SQL has run."""


class InvalidPriority(InvalidEvent):
    """Raised when a priority is not an integer of a smallint (-32768 to 32767)."""


class InvalidCommand(OutboxError, TypeError):
    """Raised when a domain has no handler for a command, or is given a second one, or one that it cannot run."""


class InvalidHandler(OutboxError, TypeError):
    """Raised when a function cannot be a handler of events, or ends the transaction that its consumer ends."""


class Reject(OutboxError):
    """Raise it in a handler to give the event up at once: it becomes a dead letter, with this reason."""


class Retry(OutboxError):
    """Raise it in a handler to have the event again after a time; None: after the usual backoff.

    `after` is a timedelta, or seconds. The delivery counts.
    """

    def __init__(self, after: timedelta | float | None = None) -> None:
        super().__init__("the handler asks for another try")
        self.after_seconds = after.total_seconds() if isinstance(after, timedelta) else after


class RolledBack(OutboxError):
    """Raised when a command goes on after a command inside it has failed: neither can be committed."""


class InvalidSetting(OutboxError, ValueError):
    """Raised when a setting is unknown or wrong. The message names it and the nearest right one."""


class Unavailable(OutboxError):
    """Raised when a server as a whole cannot do its work now: nobody's fault, and worth trying again."""


class DatabaseUnavailable(Unavailable):
    """Raised when PostgreSQL cannot be reached, or has ended the connection or the statement."""


class RedisUnavailable(Unavailable):
    """Raised when Redis cannot be reached, or refuses every write (READONLY, OOM, LOADING, ...)."""


class AlreadyInHand(OutboxError):
    """Raised when another consumer's transaction has an event in hand: it was frozen, or is slow, and was replaced."""


class Unsuitable(Unavailable):
    """Raised when a server answers but must not be used: a replica, or a Redis that evicts streams."""


class NotMigrated(OutboxError):
    """Raised when the outbox's tables are missing or older than this package."""


class DamagedBatch(OutboxError):
    """Raised when a batch of the journal is nothing that a relay has written."""


class NoServer(OutboxError):
    """Raised when no PostgreSQL or Redis can be found to start. The message says what to install."""


def first_line(error: BaseException) -> str:
    """Return the first line of a server's message: the DETAIL that may follow shows values of rows."""
    return str(error).strip().partition("\n")[0]
