"""One tree of errors. Drivers' errors are translated where they are raised, in `store` and `streams`."""


class OutboxError(Exception):
    """Raised when anything in this package goes wrong; the root of the tree."""


class InvalidEvent(OutboxError, ValueError):
    """Raised when an event cannot be recorded. The message names the field; no SQL has run."""


class InvalidPriority(InvalidEvent):
    """Raised when a priority is not an integer of a smallint (-32768 to 32767)."""


class InvalidCommand(OutboxError, TypeError):
    """Raised when a domain has no handler for a command, or is given a second one."""


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


class Unsuitable(Unavailable):
    """Raised when a server answers but must not be used: a replica, or a Redis that evicts streams."""


class NotMigrated(OutboxError):
    """Raised when the outbox's tables are missing or older than this package."""


class NoServer(OutboxError):
    """Raised when no PostgreSQL or Redis can be found to start. The message says what to install."""
