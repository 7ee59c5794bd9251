"""An outbox for a short while on somebody's servers: a schema and a few keys, of names that nobody else has.

Both are gone when it ends, however it ends, but by kill -9.
"""

from __future__ import annotations

import secrets
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import replace
from typing import Any, LiteralString, NamedTuple
from uuid import uuid4

import psycopg
import redis
from psycopg import sql
from sqlalchemy import make_url
from sqlalchemy.exc import DBAPIError

from outbox.errors import (
    DatabaseUnavailable,
    NotMigrated,
    OutboxError,
    RedisUnavailable,
    Unavailable,
    first_line,
)
from outbox.loop import signals_handled_by
from outbox.settings import Settings
from outbox.store import Store, connection_arguments
from outbox.streams import Streams, connection_pool, memory_used

APPLICATION = "outbox-relay-bench"  # our own connections; those of the outbox's relay have the schema's name
TIMEOUT_SECONDS = 15.0


class Site(NamedTuple):
    """An outbox on both servers: settings for its relays, connections, a stream, and all keys that there will be.

    The keys are those of the relay's state, of a stream to try things with, and of the lanes.
    """

    settings: Settings
    database: psycopg.Connection
    redis: redis.Redis
    outbox_id: str
    stream: str
    keys: list[str]

    @property
    def lanes(self) -> list[str]:
        return self.keys[2:]

    @property
    def probe(self) -> str:
        return self.keys[1]

    def run(self, query: LiteralString, parameters: Any = None) -> psycopg.Cursor[Any]:
        """Execute a statement, in which {schema} and {name} are the schema as a name and as a text."""
        schema, name = sql.Identifier(self.settings.schema), sql.Literal(self.settings.schema)
        return self.database.execute(sql.SQL(query).format(schema=schema, name=name), parameters)


@contextmanager
def temporary_site(config: Settings, room: int, say: Callable[[str], None]) -> Iterator[Site]:
    """Make an outbox, of which Redis will hold so many bytes at most, and remove it in the end; `say` what is made.

    Raises Unavailable or Unsuitable, for the block's errors of a driver, too, and OutboxError for a lack of rights.
    """
    site_settings, stream, keys, outbox_id = _names(config)
    with _translated():
        say("checking both servers ...")
        _check_database(site_settings)
        _check_redis(site_settings, room)
        with _connect(config) as database, _redis(config) as client:
            site = Site(site_settings, database, client, outbox_id, stream, keys)
            _check_rights(site)
            try:
                say("creating a schema ...")
                _make(site)
                yield site
            finally:
                with signals_handled_by(signal.SIG_IGN, hangup=True):
                    _remove(site)


def _names(config: Settings) -> tuple[Settings, str, list[str], str]:
    """Return the settings of a relay, its stream, all keys that it will make, and the outbox's id."""
    name = f"outbox_bench_{secrets.token_hex(4)}"
    # Begins as the user's own keys do, so that it has the same slot of a cluster, and is open to the same users.
    prefix = f"{config.redis_prefix}:{name}"
    settings = replace(
        config,
        database_url=_named(config.database_url, name),
        schema=name,
        redis_prefix=prefix,
        lane_max_entries=0,
        trace="off",
    )
    stream, outbox_id = f"{prefix}:events", str(uuid4())
    lanes = {settings.lane_rule().lane(stream, priority) for priority in range(-100, 101, 50)}
    return (
        settings,
        stream,
        [f"{prefix}:{outbox_id}", f"{prefix}:probe", *sorted({stream, *lanes})],
        outbox_id,
    )


def _named(url: str, application: str) -> str:
    """Return the URL of connections that PostgreSQL shows under this name."""
    named = make_url(url).update_query_dict({"application_name": application})
    return named.render_as_string(hide_password=False)


def _connect(config: Settings) -> psycopg.Connection:
    arguments = connection_arguments(config.database_url, config.takeover_seconds)
    arguments["application_name"] = APPLICATION
    # No prepared statements, because of transaction-pooling proxies.
    return psycopg.connect(**arguments, autocommit=True, prepare_threshold=None)


def _redis(settings: Settings) -> redis.Redis:
    pool = connection_pool(redis, settings.redis_url, APPLICATION, TIMEOUT_SECONDS)
    return redis.Redis.from_pool(pool)


def _check_database(settings: Settings) -> None:
    with closing(Store(settings.database_url, schema=settings.schema)) as store, suppress(NotMigrated):
        store.check()


def _check_redis(settings: Settings, room: int) -> None:
    with closing(Streams(settings.redis_url, prefix=settings.redis_prefix)) as streams:
        streams.check()
        info = streams.server()
    most, used = int(info.get("maxmemory", 0)), 100 * memory_used(info)
    if most and used + 100 * room / most > settings.redis_memory_percent:
        raise Unavailable(
            f"Redis has used {used:.0f} % of its maxmemory, and {room / 2**20:.0f} MB more would be above "
            f"{settings.redis_memory_percent:.0f} %; take fewer --events"
        )


def _check_rights(site: Site) -> None:
    """Make sure that what is going to be made can be made, and removed. Raises OutboxError, RedisUnavailable."""
    row = site.run(
        "SELECT has_database_privilege(current_database(), 'CREATE'), current_user, current_database()"
    ).fetchone()
    assert row is not None
    may, role, name = row
    if not may:
        grant = sql.SQL("GRANT CREATE ON DATABASE {} TO {}").format(
            sql.Identifier(name), sql.Identifier(role)
        )
        raise OutboxError(
            f"the role {role} may not make a schema in the database {name}, and the measurement needs one of its own. "
            f"Let the database's owner run: {grant.as_string()}"
        )
    site.redis.unlink(*site.keys)


def _make(site: Site) -> None:
    # Inside, because a relay that runs for months has no need of alembic in its memory.
    from outbox import migrate

    migrate.upgrade(site.settings.database_url, schema=site.settings.schema)
    site.run("UPDATE {schema}.outbox_relay SET outbox_id = %s", (site.outbox_id,))
    site.run("CREATE TABLE {schema}.probe (n int)")
    # As the relay does: a commit is durable, whatever the role's default.
    site.run(
        "SELECT set_config('synchronous_commit', 'on', false) WHERE current_setting('synchronous_commit') = 'off'"
    )


def _remove(site: Site) -> None:
    """Remove all that was made, whatever state its connections are in. Raises Unavailable, which names what is left."""
    schema, left = site.settings.schema, []
    try:
        with _connect(site.settings) as database:
            database.execute("SET lock_timeout = '10s'")
            database.execute(sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(schema)))
    except psycopg.Error as error:
        left.append(f"the schema {schema} is left, to be dropped: PostgreSQL: {first_line(error)}")
    try:
        with _redis(site.settings) as client:
            client.unlink(*site.keys)
    except redis.RedisError as error:
        left.append(f"the keys {', '.join(site.keys)} may be left, to be deleted: Redis: {error}")
    if left:
        raise Unavailable("; ".join(left))


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except DBAPIError as error:
        raise DatabaseUnavailable(f"PostgreSQL: {first_line(error.orig or error)}") from error
    except psycopg.Error as error:
        raise DatabaseUnavailable(f"PostgreSQL: {first_line(error)}") from error
    except redis.RedisError as error:
        raise RedisUnavailable(f"Redis: {str(error).rstrip('.')}") from error
