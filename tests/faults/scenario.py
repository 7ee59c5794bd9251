"""A scenario: a fault, how often, and the measure in which a naive relay or consumer fails under it."""

from __future__ import annotations

from collections.abc import Callable, Set
from dataclasses import dataclass, field
from typing import Any

from tests.acceptance.harness import PATIENCE_SECONDS
from tests.faults.trial import Between, Outcome, Trial, open_trial


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """A fault and how it is judged. `inflict` makes it happen, `short` or `long` times (or seconds: see `unit`).

    The product must do nothing wrong, and go on `within` so many seconds; the naive relay, or consumer, must do wrong
    what `control` says. Where it cannot, `control` is empty and `why` says why. `forgets`: PostgreSQL itself loses
    commits, whose events are in Redis all the same. `may_say` are the actions in the logs, of those that none may say,
    that the fault means to cause. `kind` is the trial that it takes. `missing` says what this
    machine lacks.
    `fails` says why the product is expected to fail. `control_times` is set where a short run is too short to hit a
    narrow gap of the control.
    """

    name: str
    what: str
    inflict: Callable[[Any], None]
    short: int
    long: int
    control: str
    why: str = ""
    kind: type[Trial] = Trial
    unit: str = ""
    within: float = PATIENCE_SECONDS
    postgres: dict[str, str] = field(default_factory=dict)
    redis: dict[str, str] = field(default_factory=dict)
    between: Between = "nobody"
    commits_may_fail: bool = False
    journal_is_whole: bool = True
    forgets: bool = False
    may_say: Set[str] = frozenset()
    missing: str = ""
    fails: str = ""
    control_times: int = 0

    def try_it(self, times: int, seed: int, naive: bool, watch: Callable[[Trial], None] = id) -> Outcome:
        """Run it on servers of its own; `watch` is given the trial before it starts."""
        with open_trial(
            self.kind,
            naive=naive,
            times=times,
            within=self.within,
            seed=f"{seed} {self.name}",
            postgres=self.postgres,
            redis=self.redis,
            between=self.between,
        ) as trial:
            watch(trial)
            self.inflict(trial)
            outcome = trial.judge(self.commits_may_fail, self.journal_is_whole)
            trial.complain_of_processes(self.may_say)
            return outcome

    def verdict(self, outcome: Outcome) -> str:
        """Say what the product did wrong; nothing if it kept the promise."""
        wrong = outcome.wrong().items()
        return ", ".join(
            f"{name} {count}" for name, count in wrong if not (self.forgets and name == "phantom")
        )

    def control_verdict(self, outcome: Outcome) -> str:
        """Say that the naive relay did not fail; nothing if it did, as it must."""
        return "" if outcome.wrong().get(self.control) else f"the control: {self.control} 0"
