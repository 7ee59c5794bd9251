"""Fixtures of the relay's tests."""

from collections.abc import Iterator

import pytest

from tests.integration.box import Box


@pytest.fixture
def box(database_url: str, redis_url: str) -> Iterator[Box]:
    box = Box(database_url, redis_url)
    yield box
    box.close()
