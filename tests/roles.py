"""Roles of PostgreSQL with the least rights. With OUTBOX_TEST_ROLES set, the service and the relay of the
integration tests connect as such a role, and the test itself looks on as the owner."""

from __future__ import annotations

import os

from sqlalchemy import Engine, NullPool, create_engine, make_url

from outbox import grants

WORKER = os.environ.get("PYTEST_XDIST_WORKER", "main")  # workers may share a server of the environment
ROLES = {role: f"outbox_test_{WORKER}_{role}" for role in grants.RIGHTS}
PASSWORD = "canary-of-a-role"
UNDER_ROLES = bool(os.environ.get("OUTBOX_TEST_ROLES"))
granted: set[str] = set()  # the owner's URL of each database in which the roles have their rights
_owners: dict[str, str] = {}


def role_url(url: str, role: str) -> str:
    """Return a database's URL for the role."""
    user = make_url(url).set(username=ROLES[role], password=PASSWORD)
    return user.render_as_string(hide_password=False)


def as_role(url: str, role: str) -> str:
    """Return the URL with which a test connects as the role: the owner's, where the role has no rights."""
    if url not in granted:
        return url
    given = role_url(url, role)
    _owners[given] = url
    return given


def as_owner(engine: Engine) -> Engine:
    """Return an engine of the owner, for one of a role."""
    url = engine.url.render_as_string(hide_password=False)
    return create_engine(_owners[url], poolclass=NullPool) if url in _owners else engine
