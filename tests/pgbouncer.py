"""pgbouncer in transaction mode, where this machine has it."""

from __future__ import annotations

import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
from sqlalchemy import make_url

PGBOUNCER = shutil.which("pgbouncer", path=os.environ.get("PATH", "") + ":/usr/sbin")
PATIENCE_SECONDS = 60


@contextmanager
def pgbouncer(database_url: str, connections: int = 2) -> Iterator[str]:
    """Put a pgbouncer with so few connections for everybody before a database; yield the URL to use instead."""
    assert PGBOUNCER is not None, "pgbouncer is not installed"
    url = make_url(database_url)
    port = _free_port()
    folder = Path(tempfile.mkdtemp(prefix="outbox-pgbouncer-"))
    (folder / "pgbouncer.ini").write_text(
        f"[databases]\n{url.database} = host={url.host} port={url.port} user={url.username} "
        f"password={url.password}\n[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\n"
        f"auth_type = any\npool_mode = transaction\ndefault_pool_size = {connections}\nunix_socket_dir =\n"
    )
    account: dict[str, Any] = {}
    if os.geteuid() == 0:  # it refuses root
        nobody = pwd.getpwnam("nobody")
        os.chown(folder, nobody.pw_uid, nobody.pw_gid)
        account = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
    behind = url.set(host="127.0.0.1", port=port, password=None).render_as_string(hide_password=False)
    with (folder / "log").open("w") as log:
        process = subprocess.Popen([PGBOUNCER, folder / "pgbouncer.ini"], stderr=log, cwd="/", **account)
        try:
            _wait_until_it_answers(behind, process, folder / "log")
            yield behind
        finally:
            process.terminate()
            process.wait()
            shutil.rmtree(folder)


def _wait_until_it_answers(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        try:
            psycopg.connect(url.replace("+psycopg", ""), connect_timeout=2).close()
            return
        except psycopg.OperationalError:
            assert process.poll() is None, log.read_text()
            time.sleep(0.02)
    raise AssertionError(log.read_text())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
