"""The migrations make what the models say, anywhere, again and again."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from pathlib import Path

import psycopg
import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine

from outbox import metadata, migrate
from outbox.errors import NotMigrated
from outbox.store import Store

ROOT = Path(__file__).parents[2]
ODD = 'my "odd" schema'
CATALOG = """
SELECT 'column', table_name, column_name, data_type, is_nullable, column_default
FROM information_schema.columns WHERE table_schema = %(schema)s
UNION ALL SELECT 'index', tablename, indexname, replace(indexdef, quote_ident(schemaname) || '.', ''), '', ''
FROM pg_indexes WHERE schemaname = %(schema)s
UNION ALL SELECT 'table', relname, reloptions::text, obj_description(oid), '', ''
FROM pg_class WHERE relnamespace = quote_ident(%(schema)s)::regnamespace AND relkind = 'r'
UNION ALL SELECT 'storage', attrelid::regclass::text, attname, attstorage::text, '', ''
FROM pg_attribute WHERE attname IN ('payload', 'body') AND attrelid IN (
    SELECT oid FROM pg_class WHERE relnamespace = quote_ident(%(schema)s)::regnamespace)
ORDER BY 1, 2, 3
"""


def plain(url: str) -> str:
    return url.replace("+psycopg", "")


def catalog(url: str, schema: str = "public") -> list[tuple]:
    with psycopg.connect(plain(url)) as connection:
        connection.execute("SELECT set_config('search_path', quote_ident(%s), false)", (schema,))
        return connection.execute(CATALOG, {"schema": schema}).fetchall()


def test_the_models_are_the_migrated_database(database_url):
    engine = create_engine(database_url)
    with engine.connect() as connection:
        options = {
            "compare_type": True,
            "compare_server_default": True,
            "version_table": migrate.VERSION_TABLE,
        }
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, metadata) == []
    engine.dispose()


def test_what_the_comparison_of_models_does_not_see(database_url, empty_database_url):
    """Indexes with their order and condition, and comments, as the models would create them."""
    engine = create_engine(empty_database_url)
    metadata.create_all(engine)
    engine.dispose()

    def seen(url: str) -> list[tuple]:
        rows = [row for row in catalog(url) if row[1] != migrate.VERSION_TABLE and row[0] != "storage"]
        return [row[:2] + row[3:] if row[0] == "table" else row for row in rows]

    assert seen(database_url) == seen(empty_database_url)


def test_the_tables_are_set_up_for_a_queue(database_url):
    found = {row[1]: row[2] for row in catalog(database_url) if row[0] == "table"}
    for table in ("outbox", "outbox_relay", "outbox_journal"):
        assert "autovacuum_vacuum_scale_factor=0" in found[table]
    assert "fillfactor=10" in found["outbox_relay"]
    storage = {(row[1], row[2]): row[3] for row in catalog(database_url) if row[0] == "storage"}
    assert storage[("outbox", "payload")] == storage[("outbox_journal", "body")] == "e"


def test_another_schema_holds_the_same(empty_database_url):
    migrate.upgrade(empty_database_url, schema=ODD)
    migrate.upgrade(empty_database_url)
    there, here = catalog(empty_database_url, ODD), catalog(empty_database_url)
    assert len(there) == len(here) > 40
    assert [row[:3] for row in there if row[0] != "storage"] == [
        row[:3] for row in here if row[0] != "storage"
    ]
    Store(empty_database_url, schema=ODD).check()


def test_down_and_up_again(database_url):
    before = catalog(database_url)
    migrate.downgrade(database_url)
    assert {row[1] for row in catalog(database_url)} == {migrate.VERSION_TABLE}
    with pytest.raises(NotMigrated, match="outbox-relay migrate"):
        Store(database_url).check()
    migrate.upgrade(database_url)
    migrate.upgrade(database_url)
    assert catalog(database_url) == before


def test_two_deployments_at_once(empty_database_url):
    faults: list[BaseException] = []

    def deploy() -> None:
        try:
            subprocess.run(
                [
                    sys.executable,
                    "-c",
                    f"from outbox import migrate; migrate.upgrade({empty_database_url!r})",
                ],
                check=True,
            )
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=deploy) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    Store(empty_database_url).check()


@pytest.mark.parametrize("schema", ["public", ODD])
def test_the_sql_that_is_printed_does_the_same(database_url, empty_database_url, schema):
    printed = io.StringIO()
    migrate.upgrade("", schema=schema, sql_to=printed)
    with psycopg.connect(plain(empty_database_url), autocommit=True) as connection:
        connection.execute(printed.getvalue())
    migrate.upgrade(database_url, schema=schema)
    assert catalog(empty_database_url, schema) == catalog(database_url, schema)


def test_alembic_in_a_checkout_does_the_same(database_url, empty_database_url):
    environment = os.environ | {"OUTBOX_DATABASE_URL": empty_database_url}
    subprocess.run(
        [sys.executable, "-m", "alembic", "upgrade", "head"], check=True, cwd=ROOT, env=environment
    )
    assert catalog(empty_database_url) == catalog(database_url)


def test_it_lives_beside_the_migrations_of_a_service(empty_database_url):
    with psycopg.connect(plain(empty_database_url), autocommit=True) as connection:
        connection.execute("CREATE TABLE alembic_version (version_num text PRIMARY KEY)")
        connection.execute("INSERT INTO alembic_version VALUES ('abc')")
        migrate.upgrade(empty_database_url)
        assert connection.execute("SELECT version_num FROM alembic_version").fetchall() == [("abc",)]


@pytest.mark.parametrize("schema", ["public", ODD])
def test_an_insert_wakes_a_relay_that_sleeps_and_no_other(empty_database_url, schema):
    """By a role that may do nothing but insert into the outbox."""
    migrate.upgrade(empty_database_url, schema=schema)
    quoted = '"' + schema.replace('"', '""') + '"'
    with psycopg.connect(plain(empty_database_url), autocommit=True) as admin:
        admin.execute("DROP ROLE IF EXISTS outbox_writer")
        admin.execute("CREATE ROLE outbox_writer")
        admin.execute(f"GRANT USAGE ON SCHEMA {quoted} TO outbox_writer")
        admin.execute(f"GRANT INSERT ON {quoted}.outbox TO outbox_writer")
        admin.execute("LISTEN outbox")
        heard = []
        for asleep in (False, True, False):
            admin.execute(f"UPDATE {quoted}.outbox_relay SET asleep = {asleep}")
            admin.execute("SET ROLE outbox_writer")
            admin.execute(
                f"INSERT INTO {quoted}.outbox (stream, type, payload) VALUES ('s', 'T', '1'), ('s', 'T', '2')"
            )
            admin.execute("RESET ROLE")
            heard.append([notification.payload for notification in admin.notifies(timeout=0)])
        admin.execute("DROP OWNED BY outbox_writer")
        admin.execute("DROP ROLE outbox_writer")
    assert heard == [[], [schema], []]
