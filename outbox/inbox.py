"""The idempotent consumer: a row for each event that a group has handled, in the transaction of its effects."""

from __future__ import annotations

from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Delete, delete, select
from sqlalchemy.dialects.postgresql import insert

from outbox.tables import outbox_inbox

PURGED_AT_ONCE = 5000  # rows


def first_time(group: str, event_id: UUID) -> Any:
    """Return the statement that notes an event: it inserts one row the first time, and none after that.

    While another transaction is noting the same event, it waits for that transaction's end.
    """
    row = {"consumer_group": group, "event_id": event_id}
    noted = insert(outbox_inbox).values(row).on_conflict_do_nothing()
    return noted.execution_options(preserve_rowcount=True)  # else it is -1, which looks like a first time


def purge(group: str, before: datetime) -> Delete:
    """Return the statement that deletes the oldest rows of a group, `PURGED_AT_ONCE` at the most."""
    table = outbox_inbox
    oldest = (
        select(table.c.event_id)
        .where(table.c.consumer_group == group, table.c.handled_at < before)
        .order_by(table.c.handled_at)
        .limit(PURGED_AT_ONCE)
    )
    return delete(table).where(table.c.consumer_group == group, table.c.event_id.in_(oldest))
