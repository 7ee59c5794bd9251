"""Run the migrations of the outbox: from `outbox-relay migrate`, or `alembic upgrade head` in a checkout."""

import os

from alembic import context
from sqlalchemy import create_engine, inspect, make_url, text
from sqlalchemy.schema import CreateSchema

from outbox.migrate import VERSION_TABLE
from outbox.tables import metadata

given = context.config.attributes
url = given.get("url") or os.environ.get("OUTBOX_DATABASE_URL")
schema = given.get("schema") or os.environ.get("OUTBOX_SCHEMA") or "public"

if not url and not context.is_offline_mode():
    raise SystemExit("Set OUTBOX_DATABASE_URL to the database to migrate, then run this again.")

options = {
    "target_metadata": metadata,
    "version_table": VERSION_TABLE,
    "version_table_schema": schema,
    "transaction_per_migration": False,
}
# Two deployments may migrate at once; the second waits here and finds nothing left to do. A migration
# that waits for a table's lock holds up all who come after it, so it does not wait for long.
PREPARE = (
    "SELECT pg_advisory_xact_lock(hashtext('outbox.migrate'))",
    "SET LOCAL lock_timeout = '5s'",
)


def prepare(execute, schemas) -> None:
    for statement in PREPARE:
        execute(text(statement))
    if schema not in schemas:  # PostgreSQL asks for the right to make one before it looks
        execute(CreateSchema(schema, if_not_exists=True))


if context.is_offline_mode():
    context.configure(dialect_name="postgresql", literal_binds=True, **options)
    with context.begin_transaction():
        prepare(context.execute, ["public"])
        context.run_migrations()
else:
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"))
    with engine.begin() as connection:
        prepare(connection.execute, inspect(connection).get_schema_names())
        context.configure(connection=connection, **options)
        context.run_migrations()
    engine.dispose()
