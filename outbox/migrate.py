"""Create and change the tables, with alembic; `migrations/` ships in the wheel."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from sqlalchemy import NullPool, create_engine, make_url

VERSION_TABLE = "outbox_alembic_version"  # of its own, so that it lives beside a service's migrations


def upgrade(
    url: str, *, schema: str = "public", revision: str = "head", sql_to: TextIO | None = None
) -> None:
    """Bring the tables of the database at `url` up to `revision`; may be repeated.

    `url` is any SQLAlchemy URL of PostgreSQL, `schema` where the tables live (created if it is
    missing). With `sql_to`, write the SQL there and touch no database.
    """
    command.upgrade(_config(url, schema, sql_to), revision, sql=sql_to is not None)


def downgrade(url: str, *, schema: str = "public", revision: str = "base") -> None:
    """Take the tables back to `revision`, with all that they hold."""
    command.downgrade(_config(url, schema, None), revision)


def revision_of(url: str, *, schema: str = "public") -> str | None:
    """Return the revision at which the tables of the database at `url` stand; None: there are none."""
    engine = create_engine(make_url(url).set(drivername="postgresql+psycopg"), poolclass=NullPool)
    options = {"version_table": VERSION_TABLE, "version_table_schema": schema}
    with engine.connect() as connection:
        return MigrationContext.configure(connection, opts=options).get_current_revision()


def _config(url: str, schema: str, sql_to: TextIO | None) -> Config:
    config = Config(output_buffer=sql_to)
    config.set_main_option("script_location", str(_folder()).replace("%", "%%"))
    config.attributes.update(url=url, schema=schema)
    return config


def _folder() -> Path:
    """Return the folder of the migrations: inside the installed package, or beside it in a checkout."""
    package = Path(__file__).parent
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"
