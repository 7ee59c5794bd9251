"""What real relays do under faults, the model could have done; and what a relay must never do, it could not."""

import json
import random
import re
import signal
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from outbox.testing import Server
from tests.acceptance.harness import Harness, wait_until
from tests.conftest import TEMPLATE, new_database
from tests.model.trace import Refused, accept

Lines = list[dict[str, Any]]


@pytest.fixture(scope="module")
def trace(postgres: Server, redis_server: Server, tmp_path_factory) -> Lines:
    """The trace of relays of which one after the other is killed or frozen, beside one that is not."""
    path, chance = tmp_path_factory.mktemp("trace") / "trace.jsonl", random.Random(5)
    settings = {"takeover_seconds": 1, "trace": path}
    with contextmanager(new_database)(postgres, TEMPLATE) as url, Harness(url, redis_server.url) as harness:
        harness.redis.flushall()
        with harness.writing(), harness.relay(**settings) as lasting:
            for n in range(6):
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
    assert follow(trace) == len(trace)
    print(f"{len(trace)} lines of {len({line['relay'] for line in trace})} relays")


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
    lines = [json.loads(json.dumps(line)) for line in trace]
    doctor(lines)
    with pytest.raises(Refused, match=rf"line \d+: .*{reason}") as refused:
        follow(lines)
    print(refused.value)
