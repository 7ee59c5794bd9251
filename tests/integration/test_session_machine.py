"""Whatever one does with a session, the outbox holds the events of what was committed, in order.

A Hypothesis state machine over one Session; its model is a stack of lists, one a savepoint, and what each transient
object carries. `HYPOTHESIS_PROFILE=thorough` runs ten times as many examples.
"""

from __future__ import annotations

import itertools
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Engine, inspect, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from outbox import publish
from tests.roles import as_owner
from tests.service import Base, Counted, Customer

EXAMPLES = 3000 if os.environ.get("HYPOTHESIS_PROFILE") == "thorough" else 300
numbers = itertools.count(1)
pick = st.integers(0, 10**6)


class SessionMachine(RuleBasedStateMachine):
    engine: Engine

    def __init__(self) -> None:
        super().__init__()
        with self.engine.begin() as connection:
            connection.execute(text("INSERT INTO customer VALUES ('taken', '')"))
        self.session = Session(self.engine)
        self.levels: list[list[tuple[int, Any]]] = [[]]  # (event, its object) by savepoint
        self.carried: dict[Any, list[int]] = {}  # by transient object
        self.objects: list[Any] = []
        self.merged: list[Any] = []  # objects that have been merged: they stay transient themselves

    def teardown(self) -> None:
        self.session.close()
        with as_owner(self.engine).begin() as connection:
            connection.execute(text("TRUNCATE outbox, customer"))

    # -- what a service does ------------------------------------------------------------------------------

    @rule(events=st.integers(0, 2))
    def make_an_object(self, events: int) -> None:
        customer = Customer(id=f"c{next(numbers)}", name="")
        self.objects.append(customer)
        self.carried[customer] = []
        for _ in range(events):
            self.record_on(customer)

    @precondition(lambda self: self.objects)
    @rule(which=pick)
    def record(self, which: int) -> None:
        self.record_on(self.objects[which % len(self.objects)])

    @rule()
    def publish(self) -> None:
        n = next(numbers)
        publish(self.session, Counted(n))
        self.levels[-1].append((n, None))

    @precondition(lambda self: self.addable())
    @rule(which=pick)
    def add(self, which: int) -> None:
        customer = self.addable()[which % len(self.addable())]
        self.session.add(customer)
        self.take(customer)

    @precondition(lambda self: self.transient())
    @rule(which=pick)
    def merge(self, which: int) -> None:
        customer = self.transient()[which % len(self.transient())]
        self.session.merge(customer)
        self.merged.append(customer)
        self.take(customer)

    @precondition(lambda self: self.objects)
    @rule(which=pick)
    def change(self, which: int) -> None:
        self.objects[which % len(self.objects)].name = f"n{next(numbers)}"

    @rule()
    def flush(self) -> None:
        self.session.flush()

    @rule()
    def query(self) -> None:
        self.session.query(Customer).count()

    # -- how it ends --------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.levels) <= 4)
    @rule()
    def begin_savepoint(self) -> None:
        self.session.begin_nested()
        self.levels.append([])

    @precondition(lambda self: len(self.levels) > 1)
    @rule()
    def release_savepoint(self) -> None:
        self.session.get_nested_transaction().commit()
        released = self.levels.pop()
        self.levels[-1] += released

    @precondition(lambda self: len(self.levels) > 1)
    @rule()
    def roll_back_savepoint(self) -> None:
        self.session.get_nested_transaction().rollback()
        self.undo(self.levels.pop())

    @rule()
    def roll_back(self) -> None:
        self.session.rollback()
        self.undo([*itertools.chain(*self.levels)])
        self.levels = [[]]

    @rule()
    def fail_to_flush(self) -> None:
        self.session.flush()
        n = next(numbers)
        publish(self.session, Counted(n))
        self.levels[-1].append((n, None))
        self.session.add(Customer(id="taken"))
        with pytest.raises(IntegrityError):
            self.session.flush()
        if len(self.levels) > 1:
            self.roll_back_savepoint()
        else:
            self.roll_back()

    @rule()
    def commit(self) -> None:
        self.session.commit()
        expected = [n for n, _ in itertools.chain(*self.levels)]
        self.levels = [[]]
        with as_owner(self.engine).begin() as connection:
            found = connection.execute(text("SELECT payload ->> 'n' FROM outbox ORDER BY id")).scalars().all()
            connection.execute(text("DELETE FROM outbox"))
        assert [int(n) for n in found] == expected

    # -- the model ----------------------------------------------------------------------------------------

    @invariant()
    def objects_of_the_session_carry_nothing(self) -> None:
        for customer, events in self.carried.items():
            assert not events or inspect(customer).transient

    def transient(self) -> list[Any]:
        """Return the transient objects that still have their columns; SQLAlchemy expires some."""
        return [
            customer for customer in self.objects if inspect(customer).transient and "id" in vars(customer)
        ]

    def addable(self) -> list[Any]:
        return [customer for customer in self.transient() if customer not in self.merged]

    def record_on(self, customer: Any) -> None:
        n = next(numbers)
        customer.record(Counted(n))
        if inspect(customer).session is None:
            self.carried[customer].append(n)
        else:
            self.levels[-1].append((n, customer))

    def take(self, customer: Any) -> None:
        self.levels[-1] += [(n, customer) for n in self.carried[customer]]
        self.carried[customer] = []

    def undo(self, level: list[tuple[int, Any]]) -> None:
        """Give the events of objects that are transient again back to them; they keep their order."""
        for n, customer in level:
            if customer is not None and inspect(customer).transient:
                self.carried[customer].append(n)
        for events in self.carried.values():
            events.sort()


def test_the_outbox_holds_the_events_of_what_was_committed(engine):
    Base.metadata.create_all(engine)
    SessionMachine.engine = engine
    profile = settings(
        max_examples=EXAMPLES,
        stateful_step_count=40,
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )
    run_state_machine_as_test(SessionMachine, settings=profile)
