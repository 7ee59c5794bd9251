"""The tables of the outbox, as the migrations make them.

The life of an event, by the table that holds it:

    publish ──> outbox ──claimed, added to Redis──> outbox_journal (inside the batch's bytes, purged by age)
                 ^  │
      refused,   │  │ refused max_attempts times
      will retry └──┴──────────────────────────────> outbox_dead ──dead retry──> outbox

All names are unqualified: they follow the connection's search_path, or SQLAlchemy's schema_translate_map.
"""

from __future__ import annotations

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Identity,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    PrimaryKeyConstraint,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)

metadata = MetaData()

CLOCK = text("clock_timestamp()")  # not now(), which is the start of the transaction
NEW_ID = text("gen_random_uuid()")
TIME = DateTime(timezone=True)

outbox = Table(
    "outbox",
    metadata,
    Column("id", BigInteger, Identity(), nullable=False),
    Column("event_id", Uuid, nullable=False, server_default=NEW_ID),
    Column("stream", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("key", Text),
    Column("priority", SmallInteger, nullable=False, server_default="0"),
    Column("created_at", TIME, nullable=False, server_default=CLOCK),
    Column("available_at", TIME),
    Column("payload", JSON, nullable=False),
    Column("headers", JSON),
    Column("attempts", Integer, nullable=False, server_default="0"),
    Column("last_error", Text),
    PrimaryKeyConstraint("id", name="outbox_pkey"),
    UniqueConstraint("event_id", name="outbox_event_id_key"),
    comment="events that are waiting to be published, and no others",
)
Index("outbox_claim", outbox.c.priority.desc(), outbox.c.created_at, outbox.c.id)
Index(
    "outbox_retry",
    outbox.c.stream,
    outbox.c.key,
    outbox.c.id,
    postgresql_where=outbox.c.attempts > 0,
)

outbox_relay = Table(
    "outbox_relay",
    metadata,
    Column("partition", SmallInteger, nullable=False, autoincrement=False),
    Column("outbox_id", Uuid, nullable=False, server_default=NEW_ID),
    Column("batch", BigInteger, nullable=False, server_default="0"),
    Column("asleep", Boolean, nullable=False, server_default=text("false")),
    Column("leader", Text),
    Column("led_at", TIME),
    Column("streams_lost", BigInteger, nullable=False, server_default="0"),
    Column("batches_lost", BigInteger, nullable=False, server_default="0"),
    PrimaryKeyConstraint("partition", name="outbox_relay_pkey"),
    comment="the leader's lock, and the number of the last batch",
)

outbox_journal = Table(
    "outbox_journal",
    metadata,
    Column("partition", SmallInteger, nullable=False),
    Column("batch", BigInteger, nullable=False),
    Column("events", Integer, nullable=False),
    Column("published_at", TIME, nullable=False, server_default=CLOCK),
    Column("body", LargeBinary, nullable=False),
    PrimaryKeyConstraint("partition", "batch", name="outbox_journal_pkey"),
    comment="what was published, batch by batch, in the bytes that Redis was given; purged by age",
)

outbox_dead = Table(
    "outbox_dead",
    metadata,
    Column("event_id", Uuid, nullable=False),
    Column("stream", Text, nullable=False),
    Column("type", Text, nullable=False),
    Column("key", Text),
    Column("priority", SmallInteger, nullable=False),
    Column("created_at", TIME, nullable=False),
    Column("payload", JSON, nullable=False),
    Column("headers", JSON),
    Column("attempts", Integer, nullable=False),
    Column("reason", Text, nullable=False),
    Column("died_at", TIME, nullable=False, server_default=CLOCK),
    PrimaryKeyConstraint("event_id", name="outbox_dead_pkey"),
    comment="events that Redis refused too often",
)

outbox_inbox = Table(
    "outbox_inbox",
    metadata,
    Column("consumer_group", Text, nullable=False),
    Column("event_id", Uuid, nullable=False),
    Column("handled_at", TIME, nullable=False, server_default=CLOCK),
    PrimaryKeyConstraint("consumer_group", "event_id", name="outbox_inbox_pkey"),
    Index("outbox_inbox_handled_at", "handled_at"),
    comment="the events that a consumer group has handled: the idempotent consumer",
)
