"""Faults of consumers, of what stands between them and the servers, and of a Redis that forgets what they have done."""

from __future__ import annotations

import signal

from tests.acceptance.consumers import POINTS
from tests.faults.aof import cut_tail
from tests.faults.effects import ConsumerTrial
from tests.faults.scenario import Scenario
from tests.faults.servers import ON_DISK

CONTROL_POINT = "between commit and ack"
FROZEN_AT = ("in the handler", "before the commit", "between commit and ack")


def killed(trial: ConsumerTrial) -> None:
    """One or both; every other time they come back under new names, and what was in hand must be claimed."""
    with trial.consuming():
        for n in trial.rounds():
            names = trial.chance.sample([*trial.consumers], trial.chance.randint(1, 2))
            for name in names:
                trial.end(name)
            for place, name in enumerate(names):
                trial.start(f"c{n}-{place}" if n % 2 else name, concurrency=1 + n % 3)
            trial.is_relieved(*names)


def killed_at_points(trial: ConsumerTrial) -> None:
    """It finds what the one before has left in hand, as no other claims it; a point is reached by that alone."""
    with trial.consuming(consumers=1):
        for n in trial.rounds():
            trial.wait_until_holding("c0", 5)
            trial.end("c0")
            trial.start("c0", CONTROL_POINT if trial.control else [*POINTS][n % len(POINTS)]).wait_for_death()
            trial.end("c0")
            trial.start("c0")
            trial.is_relieved("c0")


def frozen(trial: ConsumerTrial) -> None:
    """At any time, or in the middle of an event, until the other one has claimed its entries."""
    with trial.consuming():
        for n in trial.rounds():
            trial.wait_until_holding("c0", 5)
            if n % 2:
                trial.end("c0")
                trial.start("c0", FROZEN_AT[n // 2 % len(FROZEN_AT)], by="SIGSTOP").wait_until_frozen()
            else:
                trial.consumers["c0"].process.send_signal(signal.SIGSTOP)
            trial.is_relieved("c0")
            trial.let_pass(100)
            trial.consumers["c0"].process.send_signal(signal.SIGCONT)
            trial.let_pass(100)


def cut(trial: ConsumerTrial) -> None:
    """All connections to one server; every other time with a reply on its way."""
    with trial.consuming():
        for n in trial.rounds():
            link = (trial.to_database, trial.to_broker)[n % 2]
            if n % 4 < 2:
                link.lose = 1.0
                trial.lasts(0.05)
                link.lose = 0.0
            link.cut()
            trial.is_relieved(*trial.consumers)


def replies_lost(trial: ConsumerTrial) -> None:
    """`times` is how long it lasts in seconds."""
    with trial.consuming():
        trial.let_pass(100)
        trial.to_broker.lose = trial.to_database.lose = 0.05
        trial.lasts(trial.times)
        trial.to_broker.lose = trial.to_database.lose = 0.0
        trial.is_relieved(*trial.consumers)
        trial.done = trial.times


def tail_cut(trial: ConsumerTrial) -> None:
    """The group goes back in time, and the relay sends entries again under new entry ids."""
    with trial.consuming():
        trial.let_pass(200)  # so that the groups are not in the tail
        for _ in trial.rounds():
            trial.broker.kill()
            cut_tail(trial.broker.folder, trial.chance)
            trial.broker.restart()
            trial.is_relieved(*trial.consumers)


SCENARIOS = (
    Scenario(
        name="consumer-killed",
        what="kill -9 of one or both of two consumers",
        inflict=killed, kind=ConsumerTrial, short=10, long=500, control="applied twice", control_times=25,
    ),
    Scenario(
        name="consumer-killed-at-points",
        what="kill -9 of a consumer at each point of an event",
        inflict=killed_at_points, kind=ConsumerTrial, short=len(POINTS), long=20 * len(POINTS),
        control="applied twice",
    ),
    Scenario(
        name="consumer-frozen",
        what="SIGSTOP of a consumer of two until its entries are claimed, then SIGCONT",
        inflict=frozen, kind=ConsumerTrial, short=4, long=100, control="applied twice", within=10,
    ),
    Scenario(
        name="consumer-network-cut",
        what="a consumer's connections cut, to either server",
        inflict=cut, kind=ConsumerTrial, short=16, long=300, control="applied twice", between="relays",
    ),
    Scenario(
        name="consumer-replies-lost",
        what="5 % of the replies to consumers lost",
        inflict=replies_lost, kind=ConsumerTrial, short=10, long=60, unit=" s", control="applied twice",
        between="relays",
    ),
    Scenario(
        name="consumer-redis-tail-cut",
        what="kill -9 of Redis under consumers, and the tail of its log cut away",
        inflict=tail_cut, kind=ConsumerTrial, short=6, long=100, control="applied twice", redis=ON_DISK,
    ),
)  # fmt: skip
