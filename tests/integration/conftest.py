"""Fixtures of the relay's tests, and of the command line's: these use the `variables` of their file."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from click.testing import CliRunner, Result

from outbox import cli
from tests.integration.box import Box

Invoke = Callable[..., Result]
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def box(database_url: str, redis_url: str) -> Iterator[Box]:
    box = Box(database_url, redis_url)
    yield box
    box.close()


@pytest.fixture
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No setting of the developer's own."""
    for name in os.environ:
        if name.startswith("OUTBOX_") and not name.startswith("OUTBOX_TEST_"):
            monkeypatch.delenv(name)


@pytest.fixture
def invoke(variables: dict[str, str]) -> Iterator[Invoke]:
    """Run a command in this process, against the servers of the test."""

    def run(*arguments: str, **env: str) -> Result:
        return CliRunner().invoke(cli.cli, arguments, env=variables | env, prog_name="outbox-relay")

    yield run
    logging.getLogger("alembic").setLevel(logging.NOTSET)  # which `--debug migrate` has changed


@pytest.fixture
def start(variables: dict[str, str]) -> Iterator[Start]:
    """Start the command as a process of its own, which is killed after the test."""
    processes: list[subprocess.Popen[str]] = []

    def run(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        path = {"PYTHONPATH": os.pathsep.join(sys.path)}
        env = os.environ | path | variables | options.pop("env", {})
        streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
        command = [sys.executable, "-m", "outbox", *arguments]
        processes.append(subprocess.Popen(command, env=env, text=True, **streams))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.communicate()
