"""The tables of the outbox, and the trigger that wakes a sleeping relay."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = ("outbox",)
depends_on = None

CLOCK = sa.text("clock_timestamp()")
NEW_ID = sa.text("gen_random_uuid()")
TIME = sa.DateTime(timezone=True)

# A queue is written and emptied all day: vacuum by the number of dead rows, not by a share of the table,
# and without pauses.
BUSY = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "10000",
    "autovacuum_vacuum_cost_delay": "0",
    "autovacuum_analyze_scale_factor": "0",
    "autovacuum_analyze_threshold": "100000",
}
# The relay's row is updated with every batch: leave its page room for the new versions.
ONE_ROW = {
    "fillfactor": "10",
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "100",
}
# toast.* too: a journal row is almost all TOAST.
JOURNAL = {
    "autovacuum_vacuum_scale_factor": "0",
    "autovacuum_vacuum_threshold": "1000",
    "autovacuum_vacuum_cost_delay": "0",
    "toast.autovacuum_vacuum_scale_factor": "0",
    "toast.autovacuum_vacuum_threshold": "10000",
    "toast.autovacuum_vacuum_cost_delay": "0",
}

# Says that there is something to publish, but only while a relay has said that it sleeps: a NOTIFY takes
# a lock over the whole cluster at commit. The service needs no right to read outbox_relay.
WAKE = """
CREATE FUNCTION {schema}outbox_wake() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    PERFORM pg_catalog.pg_notify('outbox', TG_TABLE_SCHEMA) FROM {schema}outbox_relay WHERE asleep;
    RETURN NULL;
END
$$
"""
TRIGGER = """
CREATE TRIGGER outbox_wake AFTER INSERT ON {schema}outbox
    FOR EACH STATEMENT EXECUTE FUNCTION {schema}outbox_wake()
"""


def store_as(prefix: str, table: str, parameters: dict[str, str]) -> str:
    """Return the statement that sets a table's storage parameters."""
    values = ", ".join(f"{name} = {value}" for name, value in parameters.items())
    return f"ALTER TABLE {prefix}{table} SET ({values})"


def where() -> tuple[str, str]:
    """Return the schema to create in, and the same as a quoted prefix."""
    schema = op.get_context().version_table_schema
    return schema, postgresql.dialect().identifier_preparer.quote_identifier(schema) + "."


def upgrade() -> None:
    schema, prefix = where()
    op.create_table(
        "outbox",
        sa.Column("id", sa.BigInteger, sa.Identity(), nullable=False),
        sa.Column("event_id", sa.Uuid, nullable=False, server_default=NEW_ID),
        sa.Column("stream", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("key", sa.Text),
        sa.Column("priority", sa.SmallInteger, nullable=False, server_default="0"),
        sa.Column("created_at", TIME, nullable=False, server_default=CLOCK),
        sa.Column("available_at", TIME),
        sa.Column("payload", sa.JSON, nullable=False),
        sa.Column("headers", sa.JSON),
        sa.Column("attempts", sa.Integer, nullable=False, server_default="0"),
        sa.Column("last_error", sa.Text),
        sa.PrimaryKeyConstraint("id", name="outbox_pkey"),
        sa.UniqueConstraint("event_id", name="outbox_event_id_key"),
        schema=schema,
        comment="events that are waiting to be published, and no others",
    )
    op.execute(store_as(prefix, "outbox", BUSY))
    # Not compressed: the claim bounds a batch by pg_column_size, which must be the size it will have.
    op.execute(f"ALTER TABLE {prefix}outbox ALTER payload SET STORAGE EXTERNAL")
    op.create_index("outbox_claim", "outbox", [sa.text("priority DESC"), "created_at", "id"], schema=schema)
    op.create_index(
        "outbox_retry",
        "outbox",
        ["stream", "key", "id"],
        schema=schema,
        postgresql_where=sa.text("attempts > 0"),
    )
    op.create_table(
        "outbox_relay",
        sa.Column("partition", sa.SmallInteger, nullable=False, autoincrement=False),
        sa.Column("outbox_id", sa.Uuid, nullable=False, server_default=NEW_ID),
        sa.Column("batch", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("asleep", sa.Boolean, nullable=False, server_default=sa.text("false")),
        sa.Column("leader", sa.Text),
        sa.Column("led_at", TIME),
        sa.Column("streams_lost", sa.BigInteger, nullable=False, server_default="0"),
        sa.Column("batches_lost", sa.BigInteger, nullable=False, server_default="0"),
        sa.PrimaryKeyConstraint("partition", name="outbox_relay_pkey"),
        schema=schema,
        comment="the leader's lock, and the number of the last batch",
    )
    op.execute(store_as(prefix, "outbox_relay", ONE_ROW))
    op.execute(f"INSERT INTO {prefix}outbox_relay (partition) VALUES (0)")
    op.create_table(
        "outbox_journal",
        sa.Column("partition", sa.SmallInteger, nullable=False),
        sa.Column("batch", sa.BigInteger, nullable=False),
        sa.Column("events", sa.Integer, nullable=False),
        sa.Column("published_at", TIME, nullable=False, server_default=CLOCK),
        sa.Column("body", sa.LargeBinary, nullable=False),
        sa.PrimaryKeyConstraint("partition", "batch", name="outbox_journal_pkey"),
        schema=schema,
        comment="what was published, batch by batch, in the bytes that Redis was given; purged by age",
    )
    op.execute(store_as(prefix, "outbox_journal", JOURNAL))
    op.execute(f"ALTER TABLE {prefix}outbox_journal ALTER body SET STORAGE EXTERNAL")
    op.create_table(
        "outbox_dead",
        sa.Column("event_id", sa.Uuid, nullable=False),
        sa.Column("stream", sa.Text, nullable=False),
        sa.Column("type", sa.Text, nullable=False),
        sa.Column("key", sa.Text),
        sa.Column("priority", sa.SmallInteger, nullable=False),
        sa.Column("created_at", TIME, nullable=False),
        sa.Column("payload", sa.JSON, nullable=False),
        sa.Column("headers", sa.JSON),
        sa.Column("attempts", sa.Integer, nullable=False),
        sa.Column("reason", sa.Text, nullable=False),
        sa.Column("died_at", TIME, nullable=False, server_default=CLOCK),
        sa.PrimaryKeyConstraint("event_id", name="outbox_dead_pkey"),
        schema=schema,
        comment="events that Redis refused too often",
    )
    op.create_table(
        "outbox_inbox",
        sa.Column("consumer_group", sa.Text, nullable=False),
        sa.Column("event_id", sa.Uuid, nullable=False),
        sa.Column("handled_at", TIME, nullable=False, server_default=CLOCK),
        sa.PrimaryKeyConstraint("consumer_group", "event_id", name="outbox_inbox_pkey"),
        schema=schema,
        comment="the events that a consumer group has handled: the idempotent consumer",
    )
    op.create_index("outbox_inbox_handled_at", "outbox_inbox", ["handled_at"], schema=schema)
    op.execute(WAKE.format(schema=prefix))
    op.execute(TRIGGER.format(schema=prefix))


def downgrade() -> None:
    schema, prefix = where()
    for table in ("outbox_inbox", "outbox_dead", "outbox_journal", "outbox_relay", "outbox"):
        op.drop_table(table, schema=schema)
    op.execute(f"DROP FUNCTION {prefix}outbox_wake()")
