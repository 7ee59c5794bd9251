"""Servers and databases for the tests. Nothing is started for a test that does not ask for it."""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator

import psutil
import psycopg
import pytest
import redis as redis_client
from psycopg import sql
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import sessionmaker

from outbox import grants, migrate, testing
from outbox.errors import OutboxError
from tests.roles import PASSWORD, ROLES, UNDER_ROLES, WORKER, as_role, granted

TEMPLATE = f"outbox_template_{WORKER}"
numbers = itertools.count(1)
# In memory a database is created twenty times as fast as on a disk.
MEMORY = "/dev/shm"  # noqa: S108 - each server's folder in it has a random name
ROOM = 8 << 30  # bytes; a PostgreSQL may keep one GB of log


def pytest_configure(config: pytest.Config) -> None:
    """Refuse what would make workers empty each other's Redis; keep servers in memory, where there is enough."""
    if os.environ.get(testing.REDIS_URL) and config.getoption("numprocesses", None):
        raise pytest.UsageError(
            f"{testing.REDIS_URL}: workers cannot share one Redis; use -n 0 (make test WORKERS=0)"
        )
    if "TMPDIR" not in os.environ and has_room(MEMORY):
        os.environ["TMPDIR"], tempfile.tempdir = MEMORY, None


def has_room(folder: str) -> bool:
    """Return whether a file system in memory is there, and has room for the servers of all workers."""
    enough = os.path.isdir(folder) and min(shutil.disk_usage(folder).free, psutil.virtual_memory().available)
    return enough > ROOM


def pytest_report_header() -> list[str]:
    """Say which servers the tests will start."""
    return [
        f"server: {chosen(variable, find)}"
        for variable, find in (
            (testing.DATABASE_URL, testing.find_postgres),
            (testing.REDIS_URL, testing.find_redis),
        )
    ]


def chosen(variable: str, find: Callable[[], testing.Binary]) -> str:
    """Return the server that tests would use, with its version; starts and raises nothing."""
    if os.environ.get(variable):
        return f"the one that {variable} names"
    try:
        binary = find()
        return f"{binary.version()} ({binary.source}), {binary.path}"
    except OutboxError as error:
        return f"none: {error}"


@pytest.fixture(scope="session")
def postgres() -> Iterator[testing.Server]:
    """A PostgreSQL of this worker's own, with a template database that has been migrated."""
    with testing.postgres({"max_prepared_transactions": "10"}) as server:
        with admin(server) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {TEMPLATE} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE {TEMPLATE}")
        migrate.upgrade(url_of(server, TEMPLATE))
        yield server
        with admin(server) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {TEMPLATE} WITH (FORCE)")


@pytest.fixture(scope="session")
def redis_server() -> Iterator[testing.Server]:
    """A Redis of this worker's own. One that is not ours must be empty: we never flush a developer's data."""
    with testing.redis() as server, redis_client.Redis.from_url(server.url) as client:
        if server.source == "environment":
            need_empty(client)
        yield server
        client.flushall()


def need_empty(client: redis_client.Redis) -> None:
    if client.info("keyspace"):
        pytest.exit(f"{testing.REDIS_URL}: this Redis is not empty; give the tests one of their own", 2)


@pytest.fixture(scope="session")
def roles(postgres: testing.Server) -> Iterator[dict[str, str]]:
    """A PostgreSQL role of this worker's own for each role of the outbox, without any right."""
    drop = sql.SQL("DROP ROLE IF EXISTS {}").format(sql.SQL(", ").join(map(sql.Identifier, ROLES.values())))
    with admin(postgres) as connection:
        connection.execute(drop)
        for name in ROLES.values():
            create = sql.SQL("CREATE ROLE {} LOGIN PASSWORD {}")
            connection.execute(create.format(sql.Identifier(name), sql.Literal(PASSWORD)))
    yield ROLES
    with admin(postgres) as connection:
        connection.execute(drop)


@pytest.fixture
def database_url(postgres: testing.Server, request: pytest.FixtureRequest) -> Iterator[str]:
    """A fresh database with the outbox's tables; the URL is their owner's, see `as_role`."""
    for url in new_database(postgres, TEMPLATE):
        if UNDER_ROLES:
            grants.apply(url, grants.statements(request.getfixturevalue("roles")))
            with psycopg.connect(url.replace("+psycopg", "")) as connection:  # for its own tables
                connection.execute(f"GRANT CREATE ON SCHEMA public TO {ROLES['service']}")
            granted.add(url)
        yield url
        granted.discard(url)


@pytest.fixture
def empty_database_url(postgres: testing.Server) -> Iterator[str]:
    """A fresh database with nothing in it."""
    yield from new_database(postgres, "template0")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine of the service for the fresh database."""
    engine = create_engine(as_role(database_url, "service"))
    yield engine
    engine.dispose()


@pytest.fixture
def Session(engine: Engine) -> sessionmaker[OrmSession]:
    """Sessions on the fresh database."""
    return sessionmaker(engine)


@pytest.fixture
def redis_url(redis_server: testing.Server) -> str:
    """A Redis that was empty before the tests, and is empty again."""
    with redis_client.Redis.from_url(redis_server.url) as client:
        client.flushall()
    return redis_server.url


@pytest.fixture
def redis(redis_url: str) -> Iterator[redis_client.Redis]:
    """A client of the empty Redis; replies are bytes."""
    with redis_client.Redis.from_url(redis_url) as client:
        yield client


def admin(server: testing.Server) -> psycopg.Connection:
    return psycopg.connect(server.url.replace("+psycopg", ""), autocommit=True)


def url_of(server: testing.Server, name: str) -> str:
    url = make_url(server.url).set(drivername="postgresql+psycopg", database=name)
    return url.render_as_string(hide_password=False)


def new_database(server: testing.Server, template: str) -> Iterator[str]:
    name = f"outbox_test_{WORKER}_{next(numbers)}"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
    with admin(server) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        connection.execute(create)
    yield url_of(server, name)
    with admin(server) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
