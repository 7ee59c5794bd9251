"""Stopping, waiting, and pauses that grow."""

import fcntl
import os
import resource
import signal
import subprocess
import sys
import threading

import pytest

from outbox.loop import Backoff, Every, Stop, backoff_seconds

DAEMON = """
import time
from outbox.loop import Stop, stop_on_signals
stop = Stop()
with stop_on_signals(stop):
    print("ready", flush=True)
    stop.wait(600)
    print("stopping", flush=True)
    while input() != "done":
        pass
"""


def test_a_stop_interrupts_a_wait():
    stop = Stop()
    waiter = threading.Thread(target=stop.wait, args=(600,))
    waiter.start()
    stop.set()
    waiter.join(30)
    assert not waiter.is_alive()


def test_a_descriptor_may_have_any_number():
    """As in a service that has more than a thousand of them open."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most[1], most[1]))
    read, write = os.pipe()
    high = fcntl.fcntl(read, fcntl.F_DUPFD, 1024)
    try:
        os.write(write, b"x")
        assert Stop().wait(600, high)
    finally:
        for descriptor in (read, write, high):
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, most)


def test_a_stop_may_come_twice_or_before_the_wait():
    stop = Stop()
    stop.set()
    stop.set()
    assert stop.is_set()
    assert stop.wait(600)


def test_without_a_stop_a_wait_ends_by_itself():
    assert not Stop().wait(0.001)


@pytest.mark.parametrize(
    ("first", "then", "status"), [("TERM", None, 0), ("INT", None, 0), ("TERM", "INT", 130)]
)
def test_the_first_signal_asks_and_the_second_ends(first, then, status):
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert daemon.stdout.readline() == "ready\n"
    daemon.send_signal(signal.Signals["SIG" + first])
    assert daemon.stdout.readline() == "stopping\n"
    if then:
        daemon.send_signal(signal.Signals["SIG" + then])
        assert daemon.wait(30) == status
    daemon.communicate("done\n")
    assert daemon.returncode == status


def test_pauses_double_up_to_the_most_and_half_of_each_is_random():
    for attempts, full in ((1, 1), (2, 2), (3, 4), (9, 256), (10, 300), (10_000, 300)):
        pauses = [backoff_seconds(attempts, 1.0, 300.0) for _ in range(200)]
        assert full / 2 <= min(pauses) < max(pauses) <= full


def test_an_outage_that_ends_starts_the_pauses_over():
    outage = Backoff(1.0, 100.0)
    assert max(outage.next() for _ in range(5)) > 1
    outage.reset()
    assert outage.next() <= 1


def test_a_clock_is_due_at_once_and_then_not():
    hourly, always = Every(3600), Every(0)
    assert (hourly.due(), hourly.due()) == (True, False)
    assert (always.due(), always.due()) == (True, True)


def test_a_clock_that_is_restarted_is_due_as_often_as_it_is_told_then():
    clock = Every(3600)
    assert clock.due()
    clock.restart(0)
    assert (clock.due(), clock.due()) == (True, True)
    clock.restart(3600)
    assert not clock.due()
    never = Every(0)
    never.restart(float("inf"))
    assert not never.due()
