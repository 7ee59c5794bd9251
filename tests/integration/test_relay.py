"""The relay as a process that is frozen or told to stop, and beside a second one, on servers that crash."""

import os
import random
import signal
import subprocess
import sys
import threading
from contextlib import closing, contextmanager

import psycopg
import pytest

from outbox import migrate, testing
from outbox.errors import RedisUnavailable
from tests.integration.box import Box, after, before
from tests.integration.test_answers import journal, kill_backends
from tests.integration.test_wakeup import running, wait_until

# A daemon that stops itself (SIGSTOP) at a point of its first step.
FREEZING = """
import os, signal, sys
from outbox import cli
from outbox.store import Store
from outbox.streams import Streams

owner, name, when = sys.argv[1:]
owner = {"store": Store, "streams": Streams}[owner]
method = getattr(owner, name)

def wrapped(*arguments, **named):
    setattr(owner, name, method)
    if when == "before":
        os.kill(os.getpid(), signal.SIGSTOP)
    result = method(*arguments, **named)
    if when == "after":
        os.kill(os.getpid(), signal.SIGSTOP)
    return result

setattr(owner, name, wrapped)
sys.argv[1:] = ["run"]
cli.main()
"""


@contextmanager
def frozen(box, point, **settings):
    """Start a daemon, and wait until it has stopped itself at the point."""
    named = {"database_url": box.database_url, "redis_url": box.redis_url, "batch_size": 2} | settings
    environment = {f"OUTBOX_{name.upper()}": str(value) for name, value in named.items()}
    command = [sys.executable, "-c", FREEZING, *point.split()]
    process = subprocess.Popen(command, env=os.environ | environment, stderr=subprocess.PIPE, text=True)
    try:
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), process.stderr.read()
        yield process
    finally:
        process.kill()
        process.communicate()


POINTS = [
    "store begin after",
    "store claim after",
    "streams publish after",
    "store record_batch after",
    "store commit before",
]


# -- frozen ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batches", [1, 3])
@pytest.mark.parametrize("point", POINTS)
def test_a_frozen_leader_is_replaced_and_publishes_nothing_when_it_wakes(box, point, batches):
    names = [f"{n}" for n in range(6)]
    for name in names[: 2 * batches]:
        box.add(name, key="k")
    with frozen(box, point, takeover_seconds=1) as zombie:
        successor = box.relay(batch_size=2)
        wait_until(lambda: successor.run_once() and box.batch() == batches)
        zombie.send_signal(signal.SIGCONT)
        box.add("last", key="k")  # what the zombie publishes once it has found out
        wait_until(lambda: "last" in box.lane())
        zombie.terminate()
        assert zombie.wait() == 0
    assert box.lane() == [*names[: 2 * batches], "last"]
    assert [name for batch in journal(box).values() for name in batch] == [f'"{name}"' for name in box.lane()]


def test_a_leader_that_is_frozen_too_briefly_to_be_replaced_goes_on(box):
    box.add("a")
    with frozen(box, "streams publish before", takeover_seconds=600) as relay:
        assert box.relay().run_once() == 0
        relay.send_signal(signal.SIGCONT)
        wait_until(lambda: not box.waiting())
    assert box.lane() == ["a"]


def test_a_zombie_cannot_publish_to_a_redis_that_has_forgotten_its_successor(database_url):
    """There, the batch number would be right again. Its connection is gone; a new one, it opens in a new step."""
    with testing.redis() as server:
        box = Box(database_url, server.url)
        zombie = box.relay()
        box.add("a")

        def wake_too_late():
            kill_backends(box)
            box.add("b")
            box.relay().drain()
            server.kill()
            server.restart()

        before(zombie._streams, "publish", wake_too_late)
        with pytest.raises(RedisUnavailable):
            zombie.run_once()
        assert (box.lane(), box.batch()) == ([], 1)
        zombie.drain()
        assert box.lane() == ["a", "b"]
        box.close()


def test_a_redis_that_has_crashed_and_forgotten_is_filled_though_nothing_new_is_written(database_url):
    with testing.redis() as server:
        box = Box(database_url, server.url)
        relay = box.relay()
        box.add("a")
        relay.drain()
        server.kill()
        server.restart()
        relay.drain()
        assert box.lane() == ["a"]
        box.close()


# -- told to stop ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("point", ["store claim after", "streams publish after"])
def test_the_first_signal_finishes_the_batch_in_hand_and_ends_with_0(box, point):
    for n in range(5):
        box.add(str(n))
    with frozen(box, point, takeover_seconds=600) as relay:
        relay.send_signal(signal.SIGTERM)
        relay.send_signal(signal.SIGCONT)
        assert relay.wait() == 0
    assert (box.lane(), box.waiting(), box.batch()) == (["0", "1"], ["2", "3", "4"], 1)


def test_the_second_signal_ends_at_once_and_the_batch_in_hand_is_not_lost(box):
    box.add("a")
    with frozen(box, "store claim after", takeover_seconds=600) as relay:
        relay.send_signal(signal.SIGTERM)
        relay.send_signal(signal.SIGINT)
        relay.send_signal(signal.SIGCONT)
        assert relay.wait() in (128 + signal.SIGTERM, 128 + signal.SIGINT)
    assert (box.lane(), box.waiting()) == ([], ["a"])
    wait_until(box.relay().run_once)
    assert box.lane() == ["a"]


def test_a_standby_remembers_where_its_claims_stopped(box):
    """Else each change of the leader would read all dead rows again while an old snapshot is held."""
    box.add("a")
    leader, standby = box.relay(), box.relay()
    standby.run_once()
    before(leader._streams, "publish", standby.run_once)
    box.add("b")
    leader.run_once()
    assert standby._store._positions.parameters()["id"] != "{0}"


# -- drain -------------------------------------------------------------------------------------------------------


def test_a_drain_waits_for_what_another_relay_has_in_hand(box):
    """It ends when nothing due is left, not when another leads."""
    box.add("a")
    with frozen(box, "streams publish before", takeover_seconds=600) as other:
        relay = box.relay()
        steps = iter(range(99))
        after(relay, "run_once", lambda: next(steps) == 2 and other.send_signal(signal.SIGCONT), times=99)
        assert relay.drain() == 0
    assert (box.lane(), box.waiting()) == (["a"], [])


def test_a_drain_counts_its_own_events_and_may_be_repeated(box):
    relay = box.relay()
    box.add("a")
    assert relay.drain() == 1
    for name in "bc":
        box.add(name)
    assert (relay.drain(), relay.drain(), relay.published) == (2, 0, 3)


def test_a_drain_ends_though_events_wait_for_their_time_or_their_retry(box):
    box.redis.set("broken", "no stream")
    box.add("refused", stream="broken", key="k")
    box.add("behind it", stream="broken", key="k")
    box.add("later", available_at="2999-01-01")
    box.add("now")
    assert box.relay(backoff_seconds=600.0, backoff_max_seconds=600.0).drain() == 1
    assert (box.lane(), box.waiting()) == (["now"], ["refused", "behind it", "later"])


# -- two relays, and servers that crash -----------------------------------------------------------------------------


def write(url, more, done, seed):
    """Write events of few keys, numbered by key and priority, a few in a transaction."""
    chance, numbers = random.Random(seed), {}
    with closing(psycopg.connect(url.replace("+psycopg", ""))) as connection:
        while more():
            for _ in range(chance.randint(1, 5)):
                key, priority = f"{seed}-{chance.randrange(4)}", chance.choice([-100, -50, 0, 50, 100])
                numbers[key, priority] = n = numbers.get((key, priority), 0) + 1
                insert = (
                    "INSERT INTO outbox (stream, type, key, priority, payload) VALUES ('s', 'T', %s, %s, %s)"
                )
                connection.execute(insert, (key, priority, f'"{key} {priority:04} {n:06}"'))
            connection.commit()
    done.append(sum(numbers.values()))


@contextmanager
def writers(url, more):
    """Keep two threads writing while `more()` says so; the list gets how many events each has written."""
    done: list[int] = []
    threads = [threading.Thread(target=write, args=(url, more, done, seed)) for seed in range(2)]
    for thread in threads:
        thread.start()
    yield done
    for thread in threads:
        thread.join()


def times(number):
    left = iter(range(number))
    return lambda: next(left, None) is not None


def check_order(box, written):
    """Nothing lost or repeated, and each key's events of one priority in the order of their numbers."""
    lanes = [box.lane("s"), box.lane("s:backfill")]
    names = [name for lane in lanes for name in lane]
    assert (len(names), len(set(names))) == (written, written)
    for lane in lanes:
        last: dict[str, str] = {}
        for name in lane:
            group, _, number = name.rpartition(" ")
            assert last.get(group, "") < number
            last[group] = number


def test_two_relays_share_the_work_and_keep_the_order(box):
    relays = [box.relay(batch_size=size, takeover_seconds=1.0) for size in (7, 11)]
    with running(relays[0]), running(relays[1]):
        with writers(box.database_url, lambda: min(relay.published for relay in relays) < 100) as done:
            pass
        wait_until(lambda: not box.waiting())
        box.add("end")
        wait_until(lambda: "end" in box.lane())
    box.redis.xdel("s", box.redis.xrevrange("s", count=1)[0][0])
    check_order(box, sum(done))


def test_a_crash_of_postgresql_in_the_middle_loses_and_repeats_nothing(redis_url):
    with testing.postgres() as server:
        migrate.upgrade(server.url)
        with writers(server.url, times(300)) as done:
            pass
        box = Box(server.url, redis_url)
        relay = box.relay(batch_size=50, takeover_seconds=2.0)
        step = "record_batch"

        def crash():
            server.kill()
            server.restart()

        before(relay._store, step, crash, times=2)
        with running(relay):
            assert wait_until(lambda: entries(box) >= sum(done))
        box.sql = box.connect(autocommit=True)
        relay = box.relay()
        relay.drain()
        check_order(box, sum(done))
        box.close()


def entries(box):
    return box.redis.xlen("s") + box.redis.xlen("s:backfill")


def test_a_redis_that_crashes_and_forgets_everything_gets_it_all_again(database_url):
    with testing.redis() as server:
        box = Box(database_url, server.url)
        relay = box.relay(batch_size=20)
        calls = []

        def crash():
            calls.append("publish")
            if len(calls) in (3, 9):
                server.kill()
                server.restart()

        before(relay._streams, "publish", crash, times=10_000)
        with running(relay), writers(database_url, times(120)) as done:
            wait_until(lambda: len(calls) > 9)
        box.relay().drain()
        check_order(box, sum(done))
        box.close()
