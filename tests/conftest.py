"""Servers and databases for the tests. Nothing is started for a test that does not ask for it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import psycopg
import pytest
import redis as redis_client
from psycopg import sql
from sqlalchemy import Engine, create_engine, make_url
from sqlalchemy.orm import Session as OrmSession
from sqlalchemy.orm import sessionmaker

from outbox import migrate, testing

TEMPLATE = "outbox_template"
numbers = itertools.count(1)


def pytest_report_header() -> list[str]:
    """Say which servers the tests will start."""
    return [
        f"{name}: {binary.path} ({binary.source})"
        for name, binary in (
            ("PostgreSQL", testing.find_postgres()),
            ("Redis", testing.find_redis()),
        )
    ]


@pytest.fixture(scope="session")
def postgres() -> Iterator[testing.Server]:
    """A PostgreSQL of this worker's own, with a template database that has been migrated."""
    with testing.postgres({"max_prepared_transactions": "10"}) as server:
        print(server.describe())
        with admin(server) as connection:
            connection.execute(f"DROP DATABASE IF EXISTS {TEMPLATE} WITH (FORCE)")
            connection.execute(f"CREATE DATABASE {TEMPLATE}")
        migrate.upgrade(url_of(server, TEMPLATE))
        yield server


@pytest.fixture(scope="session")
def redis_server() -> Iterator[testing.Server]:
    """A Redis of this worker's own."""
    with testing.redis() as server:
        print(server.describe())
        yield server


@pytest.fixture
def database_url(postgres: testing.Server) -> Iterator[str]:
    """A fresh database with the outbox's tables."""
    yield from new_database(postgres, TEMPLATE)


@pytest.fixture
def empty_database_url(postgres: testing.Server) -> Iterator[str]:
    """A fresh database with nothing in it."""
    yield from new_database(postgres, "template0")


@pytest.fixture
def engine(database_url: str) -> Iterator[Engine]:
    """An engine for the fresh database."""
    engine = create_engine(database_url)
    yield engine
    engine.dispose()


@pytest.fixture
def Session(engine: Engine) -> sessionmaker[OrmSession]:
    """Sessions on the fresh database."""
    return sessionmaker(engine)


@pytest.fixture
def redis_url(redis_server: testing.Server) -> str:
    """An empty Redis. One that is not ours must be empty already: we never flush a developer's own."""
    with redis_client.Redis.from_url(redis_server.url) as client:
        if redis_server.pid is not None:
            client.flushall()
        elif client.dbsize():
            pytest.fail("the Redis at OUTBOX_TEST_REDIS_URL is not empty: give the tests one of their own")
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
    name = f"outbox_test_{next(numbers)}"
    create = sql.SQL("CREATE DATABASE {} TEMPLATE {}").format(sql.Identifier(name), sql.Identifier(template))
    with admin(server) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        connection.execute(create)
    yield url_of(server, name)
    with admin(server) as connection:
        connection.execute(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
