"""A few faults, a few times, and that the control fails under them; `make faults` has them all, and more often.

The kills of relays and consumers are in `tests/acceptance`.
"""

import dataclasses
import os
import socket
import threading
from contextlib import contextmanager

import pytest

from outbox import testing
from tests.acceptance.harness import Findings
from tests.faults.__main__ import SCENARIOS
from tests.faults.aof import read
from tests.faults.proxy import Proxy
from tests.faults.table import Line
from tests.faults.trial import Outcome

# A busy machine is no fault: a trial waits for as long as the rest of the suite does.
BY_NAME = {scenario.name: dataclasses.replace(scenario, within=60) for scenario in SCENARIOS}
SEED = 5

own_servers = pytest.mark.skipif(
    testing.DATABASE_URL in os.environ or testing.REDIS_URL in os.environ,
    reason="servers of the environment cannot be killed",
)


@own_servers
@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("relay-frozen", 1),
        ("postgres-killed", 2),
        ("redis-tail-cut", 3),
        ("redis-emptied", 1),
        ("redis-failover", 2),
        ("replies-lost", 3),
        ("lane-deleted", 2),
        ("postgres-frozen", 1),
        ("redis-frozen", 2),
        ("redis-sentinels", 1),
        ("consumer-frozen", 1),
        ("consumer-network-cut", 2),
        ("consumer-replies-lost", 2),
        ("consumer-backends-terminated", 2),
        ("consumer-redis-tail-cut", 1),
    ],
)
def test_a_fault_loses_repeats_and_reorders_nothing(name, times):
    scenario = BY_NAME[name]
    outcome = scenario.try_it(times, SEED, naive=False)
    assert scenario.verdict(outcome) == ""
    assert outcome.findings.committed > 100
    assert outcome.recoveries


@own_servers
@pytest.mark.parametrize(
    ("name", "times"),
    [
        ("relay-killed-at-points", 2),
        ("redis-tail-cut", 4),
        ("redis-failover", 2),
        ("lane-deleted", 2),
        ("redis-frozen", 2),
        ("redis-sentinels", 1),
        ("consumer-killed-at-points", 1),
        ("consumer-frozen", 1),
        ("consumer-backends-terminated", 1),
    ],
)
def test_the_control_fails_under_it(name, times):
    scenario = BY_NAME[name]
    assert scenario.control_verdict(scenario.try_it(times, SEED, naive=True)) == ""


def outcome(**wrong):
    findings = Findings(10, 10, 0, 0, 0, 0)._replace(**wrong)
    return Outcome(1, findings, passed_over=0, recoveries=[], stuck=0, complaints=[])


def test_effects_have_names_of_their_own():
    wrong = outcome(repeated=1, lost=2)._replace(of_effects=True).wrong()
    assert wrong == {"effects lost": 2, "applied twice": 1}


def line(name, naive, **wrong):
    scenario = BY_NAME[name]
    judge = scenario.control_verdict if naive else scenario.verdict
    return Line(scenario, naive, outcome(**wrong), judge(outcome(**wrong)))


def test_a_run_fails_by_the_product_that_does_wrong_and_by_the_control_that_does_not():
    assert not line("relay-killed", False).counts_as_failure()
    assert line("relay-killed", False, lost=1).counts_as_failure()
    assert line("relay-killed", True).counts_as_failure()
    assert line("relay-killed", True, lost=1).counts_as_failure()  # it should have repeated
    assert not line("relay-killed", True, repeated=1).counts_as_failure()


def test_what_is_expected_to_fail_and_does_not_fails_the_run():
    expected = dataclasses.replace(BY_NAME["relay-killed"], fails="a reason")
    assert not Line(expected, False, outcome(lost=1), "lost 1").counts_as_failure()
    assert Line(expected, False, outcome(), "").counts_as_failure()


def test_a_log_of_redis_is_read_unit_by_unit():
    single = b"*2\r\n$3\r\nDEL\r\n$1\r\na\r\n"
    multi, exec_ = b"*1\r\n$5\r\nMULTI\r\n", b"*1\r\n$4\r\nEXEC\r\n"
    log = single + multi + single + single + exec_ + single
    ends = [unit.end for unit in read(log)]
    assert ends == [len(single), len(log) - len(single), len(log)]
    assert [len(unit.commands) for unit in read(log)] == [1, 4, 1]


def test_a_command_that_a_kill_has_torn_is_no_unit():
    single = b"*2\r\n$3\r\nDEL\r\n$1\r\na\r\n"
    for end in range(len(single)):
        assert [unit.end for unit in read(single + single[:end])] == [len(single)]


# -- the proxy -------------------------------------------------------------------------------------------------


class Echo:
    """A server that sends back what it gets, and remembers it."""

    def __init__(self):
        self.got = b""
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        while True:
            connection, _ = self._listener.accept()
            while data := connection.recv(100):
                self.got += data
                connection.sendall(data)
            connection.close()


@contextmanager
def through_a_proxy():
    echo = Echo()
    with Proxy(echo.port) as proxy, socket.create_connection(("127.0.0.1", proxy.port), timeout=30) as client:
        yield echo, proxy, client


def test_the_proxy_passes_on_what_it_gets():
    with through_a_proxy() as (_, _, client):
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"


def test_the_proxy_loses_a_reply_after_the_request_has_gone_through():
    with through_a_proxy() as (echo, proxy, client):
        proxy.lose = 1.0
        client.sendall(b"hello")
        assert client.recv(100) == b""
        assert echo.got == b"hello"


def test_the_proxy_cuts_what_is_open():
    with through_a_proxy() as (_, proxy, client):
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        proxy.cut()
        assert client.recv(100) == b""


def test_the_proxy_delivers_late_what_it_has_withheld():
    with through_a_proxy() as (echo, proxy, client):
        proxy.withhold()
        client.sendall(b"hello")
        client.settimeout(0.1)
        with pytest.raises(TimeoutError):
            client.recv(100)
        assert echo.got == b""
        client.settimeout(30)
        proxy.flow()
        assert client.recv(100) == b"hello"
