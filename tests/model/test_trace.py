"""What real relays do under faults, the model could have done; and what a relay must never do, it could not."""

import json
import random
import re
import signal
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from outbox.testing import Server
from tests.acceptance.harness import LANES, Harness, wait_until
from tests.conftest import TEMPLATE, new_database
from tests.model.trace import Acceptor, Refused, accept
from tests.model.world import MAX_ATTEMPTS, Map

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def trace(postgres: Server, redis_server: Server, tmp_path_factory) -> Lines:
    """The trace of relays of which one after the other is killed or frozen, beside one that is not."""
    path, chance = tmp_path_factory.mktemp("trace") / "trace.jsonl", random.Random(5)
    settings = {"takeover_seconds": 1, "trace": path}
    with contextmanager(new_database)(postgres, TEMPLATE) as url, Harness(url, redis_server.url) as harness:
        harness.redis.flushall()
        with harness.writing(), harness.relay(**settings) as lasting:
            for n in range(4):
                with harness.relay(**settings) as other:
                    wait_until(lambda relays=n + 2: len(speakers(text(path))) >= relays, "its lead")
                    other.wait_for(harness.entries, chance.randint(1, 500))
                    if n % 2:
                        frozen, awake = chance.sample([lasting, other], 2)
                        frozen.process.send_signal(signal.SIGSTOP)
                        awake.wait_for(harness.entries, 200)
                        frozen.process.send_signal(signal.SIGCONT)
                        awake.wait_for(harness.entries, 200)
            with harness.relay(die_at="after publish", **settings) as other:
                assert other.wait_for_death() == -9
            lasting.wait_for(harness.entries, 200)
            wait_until(lambda: '"adopted": true' in text(path), "an adoption")
    return [json.loads(line) for line in text(path).splitlines()]


class Refusing(NamedTuple):
    """A trace of relays whose Redis has refused events, and the rows that say what has become of these."""

    lines: Lines
    waiting: set[str]
    refused: set[str]
    dead: set[str]


@pytest.fixture(scope="module")
def refusing(postgres: Server, redis_server: Server, tmp_path_factory) -> Refusing:
    """What a relay does while the name of a lane is taken, from the start and again; others are killed beside it."""
    path, (primary, backfill) = tmp_path_factory.mktemp("refusing") / "trace.jsonl", LANES
    settings = {"trace": path, "max_attempts": MAX_ATTEMPTS, "backoff_seconds": 0.1, "takeover_seconds": 1}
    with contextmanager(new_database)(postgres, TEMPLATE) as url, Harness(url, redis_server.url) as harness:
        harness.redis.flushall()
        harness.redis.set(backfill, "no stream")
        with harness.writing(), harness.relay(**settings) as lasting:
            wait_until(lambda: rows(harness, "outbox_dead"), "a dead letter")
            while not adopted_in_part([*map(json.loads, text(path).splitlines()[:-1])]):
                with harness.relay(die_at="after publish", **settings) as other:
                    assert other.wait_for_death() == -9
                lasting.wait_for(lambda: harness.redis.xlen(primary), 50)
            harness.redis.delete(backfill)
            lasting.wait_for(lambda: harness.redis.xlen(backfill), 50)
            with harness.redis.pipeline(transaction=True) as pipeline:
                pipeline.rename(backfill, "aside").set(backfill, "no stream").execute()
            wait_until(lambda: rows(harness, "outbox WHERE attempts > 0"), "a refused event")
            lasting.process.terminate()
            assert lasting.wait_for_death() == 0
        where = ("outbox", "outbox WHERE attempts > 0", "outbox_dead")
        return Refusing([*map(json.loads, text(path).splitlines())], *(rows(harness, each) for each in where))


def rows(harness: Harness, where: str) -> set[str]:
    """Return what a trace has of the ids of these events: their first and last eight digits."""
    return {
        event_id[:8] + event_id[-8:] for (event_id,) in harness.sql(f"SELECT event_id::text FROM {where}")
    }


def text(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def speakers(trace: str) -> set[str]:
    return {*re.findall(r'"relay": "(\w+)"', trace)}


def follow(lines: Lines) -> int:
    return accept(map(json.dumps, lines))


def find(lines: Lines, start: int, **facts: Any) -> int:
    """Return the place of the first line from `start` on that says this."""
    return next(
        place
        for place, line in enumerate(lines[start:], start)
        if all(line.get(name) == fact for name, fact in facts.items())
    )


def test_the_trace_of_relays_that_were_killed_and_frozen_is_accepted(trace):
    assert ends(trace) == {(Map(), frozenset())}
    print(f"{len(trace)} lines of {len({line['relay'] for line in trace})} relays")


def adopted_in_part(lines: Lines) -> tuple[dict[str, Any], str] | None:
    """Return the first commit that adopts a batch of which Redis had refused some events, and one that it had."""
    for commit in lines:
        if commit.get("adopted"):
            ((number, kept),) = commit["batches"].items()
            sent = lines[find(lines, 0, action="publish", batch=int(number))]["ids"].split()
            refused = [mark for mark in sent if mark not in kept.split()]
            if kept and refused:
                return commit, refused[0]
    return None


def find_commit(lines: Lines, start: int) -> int:
    """Return the place of the first commit from `start` on of a batch that its own relay had published."""
    return next(
        place
        for place, line in enumerate(lines[start:], start)
        if line["action"] == "commit" and line["batches"] and not line["adopted"]
    )


def publish_an_event_twice(lines: Lines) -> None:
    # Of batches that were committed: what a relay published as it was killed may not have happened.
    first, later = (lines[find_commit(lines, start)] for start in (0, len(lines) // 2))
    ids = first["batches"][str(first["known"] + 1)]
    again = find(lines, 0, action="publish", relay=later["relay"], batch=later["known"] + 1)
    lines[again]["ids"] += f" {ids.split()[0]}"


def skip_a_batch(lines: Lines) -> None:
    lines[find(lines, len(lines) // 2, action="publish")]["batch"] += 1


def adopt_others(lines: Lines) -> None:
    batches = lines[find(lines, 0, adopted=True)]["batches"]
    batches |= {number: ids.rpartition(" ")[0] for number, ids in batches.items()}


def commit_though_replaced(lines: Lines) -> None:
    """Have a zombie, that has read the same batch as its successor, commit it after that one has."""
    commit = find_commit(lines, len(lines) // 2)
    committed = find(lines, commit, action="committed", relay=lines[commit]["relay"])
    late = [lines[commit] | {"relay": "zombie"}, {"relay": "zombie", "action": "committed"}]
    lead = {"relay": "zombie", "action": "lead", "batch": lines[commit]["known"]}
    lines[commit : committed + 1] = [lead, *lines[commit : committed + 1], *late]


def test_the_trace_of_relays_whose_events_were_refused_is_accepted(refusing):
    ((back, dead),) = ends(refusing.lines)
    assert ids_of(back) <= refusing.waiting
    assert ids_of(mark for mark, attempts in back.items() if attempts) == refusing.refused
    assert ids_of(dead) == refusing.dead
    print(f"{len(refusing.lines)} lines, {len(back)} events put back, {len(dead)} dead letters")


def test_an_event_that_nobody_has_any_more_is_missed_in_the_end(refusing):
    lines = copy(refusing.lines)
    lost = lose_an_event(lines)
    try:
        missed = all(ids_of([lost]) == ids_of(back) - refusing.waiting for back, _ in ends(lines))
    except Refused:  # at once, where the relay that was killed had noted the answer
        missed = True
    assert missed


def lose_an_event(lines: Lines) -> str:
    """Have the relay that adopts a batch be told of one event less."""
    commit, _ = adopted_in_part(lines) or pytest.fail("nothing was adopted in part")
    ((number, ids),) = commit["batches"].items()
    lost, _, commit["batches"][number] = ids.partition(" ")
    for line in lines:
        if line["action"] == "answer" and line["kind"] == "Ahead":
            line["told"][1].get(number, [0]).pop(0)
    return lost


def copy(lines: Lines) -> Lines:
    return json.loads(json.dumps(lines))


def ends(lines: Lines) -> set[tuple[Map, frozenset[str]]]:
    """Follow a trace; return all that can have become of the events that are in no lane."""
    acceptor = Acceptor()
    for line in lines:
        acceptor.accept(line)
    return acceptor.ends()


def ids_of(marks: Iterable[str]) -> set[str]:
    """Return what marks have of ids, without their rows."""
    return {mark.partition(":")[2] for mark in marks}


def find_refusal(lines: Lines) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Return publish, answer and commit of a batch of which Redis has refused events."""
    for place, answer in enumerate(lines):
        if answer["action"] == "answer" and answer["kind"] == "Added" and answer["told"][0]:
            relay = answer["relay"]
            ours = [line for line in lines[:place] if line["relay"] == relay]
            after = lines[find(lines, place, relay=relay) + 1 :]
            following = next((line for line in after if line["relay"] == relay), {})
            if following.get("action") == "commit":
                return ours[-1], answer, following
    raise AssertionError("nothing was refused")


def publish_what_was_refused(lines: Lines) -> None:
    publish, answer, commit = find_refusal(lines)
    refused = publish["ids"].split()[int(min(answer["told"][0]))]
    commit["batches"][str(publish["batch"])] += f" {refused}"


def forget_a_refusal(lines: Lines) -> None:
    _, answer, _ = find_refusal(lines)
    answer["told"] = [{}, []]


def put_back_what_was_added(lines: Lines) -> None:
    _, _, commit = find_refusal(lines)
    commit["batches"] = {number: ids.partition(" ")[2] for number, ids in commit["batches"].items()}


def adopt_what_was_refused(lines: Lines) -> None:
    """Of a batch whose relay was killed before it was told."""
    commit, refused = adopted_in_part(lines) or pytest.fail("nothing was adopted in part")
    (number,) = commit["batches"]
    commit["batches"][number] += f" {refused}"


def publish_a_dead_letter(lines: Lines) -> None:
    ((_, dead),) = ends(lines)
    lines[find_last(lines, action="publish")]["ids"] += f" {min(dead)}"


def find_last(lines: Lines, **facts: Any) -> int:
    return len(lines) - 1 - find(lines[::-1], 0, **facts)


@pytest.mark.parametrize(
    ("doctor", "reason"),
    [
        (publish_what_was_refused, "is committed with other events than Redis has of it"),
        (forget_a_refusal, "is committed with other events than Redis has of it"),
        (put_back_what_was_added, "is committed with other events than Redis has of it"),
        (adopt_what_was_refused, "is adopted with other events than Redis has of it"),
        (publish_a_dead_letter, "is published, and is a dead letter"),
    ],
)
def test_a_doctored_trace_of_refusals_is_refused(refusing, doctor: Callable[[Lines], None], reason: str):
    is_refused(refusing.lines, doctor, reason)


def is_refused(trace: Lines, doctor: Callable[[Lines], None], reason: str) -> None:
    """Check that a trace is refused for this reason, when it has been doctored."""
    lines = copy(trace)
    doctor(lines)
    with pytest.raises(Refused, match=rf"line \d+: .*{reason}") as refused:
        follow(lines)
    print(refused.value)


@pytest.mark.parametrize(
    ("doctor", "reason"),
    [
        (publish_an_event_twice, "is published with batch"),
        (skip_a_batch, r"batch \d+ is published after"),
        (adopt_others, "is adopted with other events than Redis has of it"),
        (commit_though_replaced, "zombie has committed, and another has led"),
    ],
)
def test_a_doctored_trace_is_refused(trace, doctor: Callable[[Lines], None], reason: str):
    is_refused(trace, doctor, reason)
