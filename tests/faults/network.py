"""Faults of the network between the relay and both servers."""

from __future__ import annotations

from tests.faults.scenario import Scenario
from tests.faults.trial import Trial


def cut(trial: Trial) -> None:
    with trial.under_load():
        for n in trial.rounds():
            trial.wait_for_publish()
            (trial.to_database, trial.to_broker)[n % 2].cut()
            trial.recovers()


def replies_lost(trial: Trial) -> None:
    """30 % of the replies of Redis and 3 % of PostgreSQL's are lost, while the requests go through."""
    with trial.under_load():
        trial.to_broker.lose, trial.to_database.lose = 0.3, 0.03
        trial.lasts(trial.times)
        trial.to_broker.lose = trial.to_database.lose = 0.0
        trial.recovers()
        trial.done = trial.times


def delayed(trial: Trial) -> None:
    """Everything takes 20 ms each way, and the connections are cut now and then."""
    with trial.under_load():
        trial.to_broker.delay_seconds = trial.to_database.delay_seconds = 0.02
        for _ in trial.rounds():
            trial.wait_for_publish()
            trial.to_database.cut()
            trial.to_broker.cut()
            trial.recovers()


def cut_off(trial: Trial) -> None:
    """One relay of two reaches nothing for a while; what it sent before arrives when it does again."""
    with trial.under_load(), trial.relay(see=trial.direct) as beside:
        beside.wait_until_connected()
        for _ in trial.rounds():
            trial.to_broker.withhold()
            trial.lasts(0.3)  # so that a batch is on its way
            trial.to_database.withhold()
            trial.recovers()
            trial.lasts(6)  # longer than a client waits for a reply
            trial.to_database.flow()
            trial.to_broker.flow()
            trial.let_pass(50)


SCENARIOS = (
    Scenario(
        name="network-cut",
        what="connections cut, to either server",
        inflict=cut, short=16, long=300, control="repeated", between="relays",
    ),
    Scenario(
        name="replies-lost",
        what="30 % of Redis' replies lost, and 3 % of PostgreSQL's",
        inflict=replies_lost, short=10, long=60, unit=" s", control="repeated", between="relays",
    ),
    Scenario(
        name="network-slow",
        what="20 ms each way, and connections cut",
        inflict=delayed, short=5, long=60, control="repeated", between="relays",
    ),
    Scenario(
        name="relay-cut-off",
        what="one relay of two behind a network that drops everything",
        inflict=cut_off, short=3, long=30, control="repeated", between="relays", within=8,
    ),
)  # fmt: skip
