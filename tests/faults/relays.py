"""Faults of the relay's process."""

from __future__ import annotations

import signal
from contextlib import nullcontext

from tests.acceptance.die_at import POINTS
from tests.faults.scenario import Scenario
from tests.faults.trial import Trial


def killed(trial: Trial) -> None:
    with trial.under_load():
        for _ in trial.rounds():
            if trial.chance.random() < 0.5:
                trial.wait_for_publish()
            trial.replace(trial.relays[0])
            trial.recovers()


def killed_at_points(trial: Trial) -> None:
    """Some points are reached only after another relay has left a batch to be adopted."""
    with trial.under_load():
        for n in trial.rounds():
            trial.replace(trial.relays[0]).kill()
            point = [*POINTS][n % len(POINTS)]
            first = ["after publish"] if point in ("in adopt", "in look") else []
            for die_at in [*first, point]:
                die_at = "after publish" if trial.naive else die_at
                with trial.relay(die_at=die_at, journal_retention_seconds=0.1) as relay:
                    status = relay.wait_for_death()
                    trial.complain_unless(status == -9, f"{die_at}: a relay ended with {status}")
            trial.replace(trial.relays[0])
            trial.recovers()


def frozen(trial: Trial) -> None:
    """The one that leads is frozen, at any time or with a batch that it is about to send; it wakes up as a zombie.

    Of the control no two work at a time, as these are out of order by themselves.
    """
    with trial.under_load(relays=1 if trial.naive else 2):
        for n in trial.rounds():
            if n % 2:
                relay = trial.leader()
                relay.process.send_signal(signal.SIGSTOP)
            else:
                relay = trial.replace(trial.relays[0], die_at="after claim", by="SIGSTOP")
                relay.wait_until_frozen()
            with trial.relay() if trial.naive else nullcontext():
                trial.recovers()
                trial.let_pass(100)
            relay.process.send_signal(signal.SIGCONT)
            trial.let_pass(100)


def restarted(trial: Trial) -> None:
    """SIGTERM, one after the other, with a second relay beside; each must end by itself, with 0."""
    with trial.under_load(relays=2):
        for n in trial.rounds():
            relay = trial.relays[n % 2]
            relay.process.terminate()
            trial.recovers()
            status = relay.wait_for_death()
            trial.complain_unless(trial.naive or status == 0, f"a relay ended with {status}")
            trial.replace(relay)


SCENARIOS = (
    Scenario(
        name="relay-killed",
        what="kill -9 of the relay",
        inflict=killed, short=20, long=1000, control="repeated",
    ),
    Scenario(
        name="relay-killed-at-points",
        what="kill -9 of the relay at each point of its step",
        inflict=killed_at_points, short=len(POINTS), long=20 * len(POINTS), control="repeated",
        journal_is_whole=False,
    ),
    Scenario(
        name="relay-frozen",
        what="SIGSTOP of the leading relay of two, then SIGCONT",
        inflict=frozen, short=5, long=100, control="out of order", within=5,
    ),
    Scenario(
        name="relays-restarted",
        what="rolling restarts of two relays (SIGTERM)",
        inflict=restarted, short=8, long=200, control="repeated",
    ),
)  # fmt: skip
