"""kill -9 of the relay under load: nothing lost, repeated or reordered; and the control, which repeats."""

import os
import random
import signal
from collections.abc import Iterator

import pytest

from tests.acceptance.die_at import POINTS
from tests.acceptance.harness import Batch, Entry, Findings, Harness, compare, passed_over

KILLS = int(os.environ.get("OUTBOX_TEST_KILLS", "8"))


@pytest.fixture
def harness(database_url: str, redis_url: str) -> Iterator[Harness]:
    with Harness(database_url, redis_url) as harness:
        yield harness


@pytest.fixture
def control(database_url: str, redis_url: str) -> Iterator[Harness]:
    with Harness(database_url, redis_url, naive=True) as control:
        yield control


def test_the_oracle_sees_each_kind_of_fault():
    def lane(*events: str) -> list[Entry]:
        return [Entry(event_id, "k", 0, int(event_id[1:])) for event_id in events]

    assert compare(["e1", "e2"], [lane("e1", "e2")]).faults() == (0, 0, 0, 0)
    assert compare(["e1", "e2"], [lane("e1")]) == Findings(
        2, 1, lost=1, repeated=0, phantom=0, out_of_order=0
    )
    assert compare(["e1"], [lane("e1", "e1")]).repeated == 1
    assert compare(["e1"], [lane("e1"), lane("e1")]).repeated == 1
    assert compare([], [lane("e1")]).phantom == 1
    assert compare(["e1", "e2"], [lane("e2", "e1")]).out_of_order == 1
    assert compare(["e1", "e2"], [lane("e1", "e2", "e1")]).faults() == (0, 1, 0, 0)
    assert compare(["e1"], [[]], ["e1"]).lost == 0


def test_the_oracle_sees_an_event_that_a_lower_priority_went_before():
    """It is judged only when it had committed before the batch that came first was claimed."""
    batches = [Batch(1.0, [("e0", 0)]), Batch(2.0, [("low", -50)]), Batch(3.0, [("high", 50)])]
    assert passed_over(batches, {"high": 0.9}) == 1
    assert passed_over(batches, {"high": 1.1}) == 0  # the batch of the low one may not have seen it
    assert passed_over(batches, {}) == 0
    assert passed_over([batches[0], batches[2], batches[1]], {"high": 0.9, "low": 0.9}) == 0


def test_killed_at_any_time(harness):
    chance = random.Random(7)
    with harness.writing():
        for _ in range(KILLS):
            with harness.relay() as relay:
                relay.wait_for(harness.entries, chance.randint(1, 500))
                relay.kill()
    findings = harness.settle()
    print(f"{KILLS} kills: {findings}")
    assert findings.committed > 50 * KILLS
    assert findings.faults() == (0, 0, 0, 0)
    assert harness.journal_is_right()


def test_one_of_two_relays_killed_or_frozen_at_any_time(harness):
    """What is frozen for longer than a takeover takes wakes up as a zombie."""
    chance = random.Random(11)
    rounds = max(4, KILLS // 2)
    with harness.writing(), harness.relay(takeover_seconds=1) as lasting:
        for n in range(rounds):
            with harness.relay(takeover_seconds=1) as other:
                other.wait_for(harness.entries, chance.randint(1, 1000))
                if n % 2:
                    frozen, awake = chance.sample([lasting, other], 2)
                    frozen.process.send_signal(signal.SIGSTOP)
                    awake.wait_for(harness.entries, 200)
                    frozen.process.send_signal(signal.SIGCONT)
                    awake.wait_for(harness.entries, 200)
    findings = harness.settle()
    print(f"{rounds} rounds with two relays: {findings}")
    assert findings.faults() == (0, 0, 0, 0)
    assert harness.journal_is_right()


@pytest.mark.parametrize("point", [point for point in POINTS if point not in ("in adopt", "in look")])
def test_killed_at_a_point_of_its_step(harness, point):
    with harness.writing():
        for _ in range(2):
            with harness.relay(die_at=point, journal_retention_seconds=0.1) as relay:
                assert relay.wait_for_death() == -9
        with harness.relay() as relay:
            relay.wait_for(harness.entries, 100)
            adopted = "batch_adopted" in relay.log
    if point != "in purge":  # which is another thread: the relay may be anywhere in its step
        assert adopted == (point in ("in the reply", "after claim ahead", "after publish", "after journal"))
    assert harness.settle().faults() == (0, 0, 0, 0)


@pytest.mark.parametrize("point", ["in adopt", "in look"])
def test_killed_again_while_it_adopts(harness, point):
    with harness.writing():
        for die_at in ("after publish", point):
            with harness.relay(die_at=die_at) as relay:
                assert relay.wait_for_death() == -9
        with harness.relay() as relay:
            relay.wait_for(harness.entries, 100)
            assert "batch_adopted" in relay.log
    assert harness.settle().faults() == (0, 0, 0, 0)


def test_the_control_repeats_what_it_published_before_it_was_killed(control):
    with control.writing():
        for _ in range(3):
            with control.relay(die_at="after publish") as relay:
                assert relay.wait_for_death() == -9
    assert control.settle().repeated > 0


@pytest.mark.skipif("OUTBOX_TEST_KILLS" not in os.environ, reason="set OUTBOX_TEST_KILLS, to 50 say")
def test_the_control_repeats_when_it_is_killed_at_any_time(control):
    chance = random.Random(7)
    with control.writing():
        for _ in range(KILLS):
            with control.relay() as relay:
                relay.wait_for(control.entries, chance.randint(1, 500))
                relay.kill()
    findings = control.settle()
    print(f"{KILLS} kills of the control: {findings}")
    assert findings.repeated > 0
