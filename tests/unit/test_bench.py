"""What is said to bound a relay, from what was measured."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from outbox.bench import report, summary, verdict
from outbox.measure import Findings, Round, Server


def findings(
    *,
    at_work: int = 0,
    at_disk: int = 0,
    redis: float | None = 0.0,
    python: float = 0.0,
    machine: float = 0.5,
) -> Findings:
    """Two rounds of 1,000 events in one second; PostgreSQL was looked at a hundred times in each."""
    moments = Counter[str | None](postgresql=at_work, commit=at_disk, elsewhere=100 - at_work - at_disk)
    one = Round(1000, 2, 1.0, python, redis, machine, moments)
    return Findings(
        Server("PostgreSQL 18.6", 0.002, {"fsync": "on", "synchronous_commit": "on"}, {"commit": 0.004}),
        Server("valkey 9.1.2", 0.001, {"appendonly": "off"}, {"entry": 0.00001}),
        300,
        [one, one],
        [0.001, 0.002, 0.003],
    )


@pytest.mark.parametrize(
    ("found", "bound", "said"),
    [
        (findings(at_work=50, at_disk=10, redis=0.2), "postgresql",
         ["PostgreSQL bounds it", "60 % of the time", "10 % at its disk", "Redis, with 20 %", "1,667 events/s"]),
        (findings(at_work=10, redis=0.8, python=0.1), "redis", ["Redis bounds it", "80 %", "1,250 events/s"]),
        (findings(at_work=10, redis=0.2, python=0.5), "python", ["Python bounds it", "50 %", "2,000 events/s"]),
        (findings(at_work=20, redis=0.1, python=0.1), "between",
         ["The way between them bounds it", "60 %", "PostgreSQL takes 2.00 ms", "Redis 1.00 ms"]),
        (findings(at_work=90, machine=0.97), "machine", ["This machine bounds it, or hides what does: 97 %"]),
        (findings(at_work=20, redis=None), "between", ["cannot be told", "80 %", "Redis may not be asked"]),
    ],
    ids=["postgresql", "redis", "python", "between", "machine", "unknown"],
)  # fmt: skip
def test_the_largest_share_bounds_the_relay(found: Findings, bound: str, said: list[str]) -> None:
    assert summary(found)["bound"] == bound
    for part in said:
        assert part in verdict(found)


def test_of_a_relay_that_does_two_things_at_once_nothing_is_left_between() -> None:
    assert findings(at_work=90, redis=0.8, python=0.6).shares() == (0.9, 0.0, 0.8, 0.6, 0.0)


def test_what_postgresql_does_not_show_is_unknown_and_left_between() -> None:
    found = findings(redis=0.25, python=0.25)
    hidden = replace(found.rounds[0], moments=Counter[str | None]({None: 100}))
    shares = replace(found, rounds=[hidden]).shares()
    assert shares == (None, None, 0.25, 0.25, 0.5)


def test_a_share_that_is_not_known_is_a_dash_for_people_and_null_for_programs() -> None:
    state = summary(findings(at_work=50, redis=None, machine=None))
    assert state["shares"]["redis"] is None
    assert state["machine_cpu"] is None
    lines = [*report(state).plain()]
    assert any(line.split()[-1] == "-" and line.startswith("Redis") for line in lines)
    assert not any("None" in line for line in lines)
