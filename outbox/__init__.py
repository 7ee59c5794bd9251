"""A transactional outbox with priorities: from SQLAlchemy's session to the lanes of Redis Streams."""

from outbox.consumer import AsyncConsumer, Consumer
from outbox.domain import AsyncDomain, Domain
from outbox.errors import (
    InvalidCommand,
    InvalidEvent,
    InvalidHandler,
    InvalidPriority,
    OutboxError,
    Reject,
    Retry,
    RolledBack,
)
from outbox.event import Received, event
from outbox.priority import Priority, carry_priority, current_priority, processing_priority
from outbox.session import RecordsEvents, publish
from outbox.tables import metadata

__all__ = [
    "AsyncConsumer",
    "AsyncDomain",
    "Consumer",
    "Domain",
    "InvalidCommand",
    "InvalidEvent",
    "InvalidHandler",
    "InvalidPriority",
    "OutboxError",
    "Priority",
    "Received",
    "RecordsEvents",
    "Reject",
    "Retry",
    "RolledBack",
    "carry_priority",
    "current_priority",
    "event",
    "metadata",
    "processing_priority",
    "publish",
]
