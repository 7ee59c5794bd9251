"""A transactional outbox with priorities: from SQLAlchemy's session to the lanes of Redis Streams."""

from outbox.domain import AsyncDomain, Domain
from outbox.errors import InvalidCommand, InvalidEvent, InvalidPriority, OutboxError, RolledBack
from outbox.event import event
from outbox.priority import Priority, carry_priority, current_priority, processing_priority
from outbox.session import RecordsEvents, publish
from outbox.tables import metadata

__all__ = [
    "AsyncDomain",
    "Domain",
    "InvalidCommand",
    "InvalidEvent",
    "InvalidPriority",
    "OutboxError",
    "Priority",
    "RecordsEvents",
    "RolledBack",
    "carry_priority",
    "current_priority",
    "event",
    "metadata",
    "processing_priority",
    "publish",
]
