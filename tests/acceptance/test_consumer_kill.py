"""kill -9 of consumers under load: with the inbox each effect exactly once; and controls, which lose and repeat."""

import os
import random
import signal
from collections.abc import Iterator

import pytest

from tests.acceptance.consumers import POINTS, Consumers
from tests.acceptance.harness import wait_until

LEFT_TO = {"after a take": "dies", "in the claim": "dead"}  # by a point: who has left what it is reached with
KILLS = int(os.environ.get("OUTBOX_TEST_KILLS", "8"))


@pytest.fixture
def consumers(database_url: str, redis_url: str) -> Iterator[Consumers]:
    with Consumers(database_url, redis_url) as consumers:
        yield consumers


def kill_at_any_time(consumers: Consumers, kind: str, kills: int) -> None:
    """Kill one of two consumers again and again; every other one comes back under a new name."""
    chance = random.Random(5)
    with consumers.publishing(), consumers.start("lasting", kind, concurrency=2):
        for n in range(kills):
            name = "again" if n % 2 else f"new-{n}"
            with consumers.start(name, kind, concurrency=1 + n % 3) as process:
                process.wait_for(lambda name=name: of(consumers, name), chance.randint(1, 60))
                process.kill()


def of(consumers: Consumers, name: str) -> int:
    """Return how many effects there are of one consumer."""
    return consumers.sql.execute("SELECT count(*) FROM effect WHERE consumer = %s", (name,)).fetchone()[0]


def test_killed_at_any_time(consumers):
    kill_at_any_time(consumers, "inbox", KILLS)
    findings = consumers.settle()
    print(f"{KILLS} kills: {findings}")
    assert findings.applied > 20 * KILLS
    assert findings == (findings.published, findings.published, 0, 0, 0)


def test_without_the_inbox_nothing_is_lost_either(consumers):
    kill_at_any_time(consumers, "none", 4)
    findings = consumers.settle("none")
    print(f"without the inbox: {findings}")
    assert (findings.lost, findings.dead) == (0, 0)


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_a_point_of_an_event(consumers, point):
    # It asks once a page is full, and acks every 50 ms.
    of_primary = 1300 if point in ("after an ask", "after the ack") else 100
    consumers.publish(of_primary)
    consumers.publish(20, "s:backfill")
    for _ in range(2):
        if point in LEFT_TO:
            consumers.publish(20)
            consumers.leave(20, LEFT_TO[point])
        with consumers.start("dies", die_at=point) as process:
            assert process.wait_for_death() == -9
    findings = consumers.settle()
    assert findings == (findings.published, findings.published, 0, 0, 0)


def ended_or_done(process, consumers: Consumers) -> bool:
    return process.process.poll() is not None or (consumers.effects() > 0 and consumers.settled())


def test_the_control_without_an_inbox_repeats(consumers):
    consumers.publish(100)
    with consumers.start("dies", "none", die_at="between commit and ack") as process:
        assert process.wait_for_death() == -9
    assert consumers.settle("none").repeated > 0


def test_the_control_that_acks_first_loses(consumers):
    consumers.publish(100)
    with consumers.start("dies", "early", die_at="in the handler") as process:
        assert process.wait_for_death() == -9
    assert consumers.settle("early").lost > 0


def test_a_poison_event_is_given_up_and_what_is_behind_it_is_not(consumers):
    consumers.publish(1, start="poison")
    consumers.publish(50)
    deaths = 0
    while deaths < 10:
        with consumers.start("crashes", poison="poison0", max_deliveries=3) as process:
            wait_until(lambda process=process: ended_or_done(process, consumers))
            if process.process.poll() is None:
                break
            deaths += 1
    assert deaths == 4  # one more than `max_deliveries`, as it may have died before its handler was called
    findings = consumers.settle()
    assert (findings.applied, findings.repeated, findings.dead) == (50, 0, 1)
    most = consumers.sql.execute("SELECT max(delivery) FROM effect").fetchone()[0]
    assert most <= 2  # once as it was read, and once as it was taken up


@pytest.mark.parametrize("kind", ["inbox", "none"])
def test_frozen_and_thawed(consumers, kind):
    """Frozen in a handler for longer than `claim_idle`, it must not go on with what it had read."""
    consumers.publish(300)
    with consumers.start("frozen", kind, freeze="e150") as frozen:
        wait_until(lambda: "T" in status(frozen.process.pid), "a frozen consumer")
        before = of(consumers, "frozen")
        with consumers.start("awake", kind):
            wait_until(lambda: not consumers.unread("s") and pending(consumers) <= 1)
            frozen.process.send_signal(signal.SIGCONT)
            consumers.publish(50)
            wait_until(consumers.settled)
    findings = consumers.settle(kind)
    assert (findings.lost, findings.dead) == (0, 0)
    assert kind == "none" or findings.repeated == 0
    again = consumers.sql.execute(
        "SELECT name FROM effect WHERE consumer = 'frozen' AND substr(name, 2)::int BETWEEN 151 AND 299"
    ).fetchall()
    assert before >= 100
    assert again == []


def pending(consumers: Consumers) -> int:
    return consumers.redis.xpending("s", "g")["pending"]


def status(pid: int) -> str:
    """Return the state of a process, as ps says it."""
    import psutil

    return "T" if psutil.Process(pid).status() == psutil.STATUS_STOPPED else ""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_nothing_pending(consumers, number):
    consumers.publish(3000)
    with consumers.start("ends", concurrency=2) as process:
        process.wait_for(consumers.effects, 100)
        process.process.send_signal(number)
        assert process.wait_for_death() == 0
    assert consumers.effects() < 3000
    assert pending(consumers) == 0
    assert consumers.settle() == (3000, 3000, 0, 0, 0)
