"""Whatever one does with a session, the outbox holds the events of what was committed, in order.

A Hypothesis state machine over one Session; its model is a stack of lists, one a savepoint, and what each object
of no session carries. `HYPOTHESIS_PROFILE=thorough` runs ten times as many examples.
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
        self.levels: list[list[tuple[int, Any]]] = [[]]  # (event, its object) by savepoint; event 0: added
        self.carried: dict[Any, list[int]] = {}  # by object of no session
        self.objects: list[Any] = []
        self.merged: list[Any] = []  # objects that have been merged: they stay out of the session

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

    @rule(events=st.integers(0, 2))
    def make_a_detached_object(self, events: int) -> None:
        customer = Customer(id=f"c{next(numbers)}", name="")
        with Session(self.engine, expire_on_commit=False) as other:
            other.add(customer)
            other.commit()
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
        self.levels[-1].append((0, customer))
        self.take(customer)

    @precondition(lambda self: self.mergeable())
    @rule(which=pick)
    def merge(self, which: int) -> None:
        customer = self.mergeable()[which % len(self.mergeable())]
        self.session.merge(customer)
        self.merged.append(customer)
        self.take(customer)

    @precondition(lambda self: self.pending() or self.addable())
    @rule(which=pick)
    def expunge(self, which: int) -> None:
        """Take an object away before its flush; one that is pending was added since the last savepoint."""
        if not self.pending():
            self.add(which)
        customer = self.pending()[which % len(self.pending())]
        self.session.expunge(customer)
        self.carried[customer] = [n for n, owner in self.levels[-1] if n and owner is customer]
        self.levels[-1] = [entry for entry in self.levels[-1] if entry[1] is not customer]

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

    @precondition(lambda self: len(self.levels) > 2)
    @rule(which=pick)
    def roll_back_an_outer_savepoint(self, which: int) -> None:
        level = which % (len(self.levels) - 2) + 1
        savepoint = self.session.get_nested_transaction()
        for _ in self.levels[level + 1 :]:
            savepoint = savepoint.parent
        savepoint.rollback()
        self.undo([*itertools.chain(*self.levels[level:])])
        del self.levels[level:]
        self.expunge_what_has_no_row()

    @rule()
    def roll_back(self) -> None:
        self.session.rollback()
        while self.levels:
            self.undo(self.levels.pop())
        self.levels = [[]]

    @rule()
    def close(self) -> None:
        """Close without a rollback: every object keeps its columns, and so its events."""
        self.session.close()
        for n, customer in itertools.chain(*self.levels):
            if n and customer:
                self.carried[customer].append(n)
        for events in self.carried.values():
            events.sort()
        self.levels = [[]]

    @rule(then=st.sampled_from(["roll back", "close"]))
    def fail_to_flush(self, then: str) -> None:
        self.session.flush()
        n = next(numbers)
        publish(self.session, Counted(n))
        self.levels[-1].append((n, None))
        self.session.add(Customer(id="taken"))
        with pytest.raises(IntegrityError):
            self.session.flush()
        if then == "close":
            self.undo(self.levels.pop())
            self.close()
        elif len(self.levels) > 1:
            self.roll_back_savepoint()
        else:
            self.roll_back()

    @rule()
    def commit(self) -> None:
        self.session.commit()
        expected = [n for n, _ in itertools.chain(*self.levels) if n]
        self.levels = [[]]
        with as_owner(self.engine).begin() as connection:
            found = connection.execute(text("SELECT payload ->> 'n' FROM outbox ORDER BY id")).scalars().all()
            connection.execute(text("DELETE FROM outbox"))
        assert [int(n) for n in found] == expected

    # -- the model ----------------------------------------------------------------------------------------

    @invariant()
    def objects_of_the_session_carry_nothing(self) -> None:
        for customer, events in self.carried.items():
            assert not events or inspect(customer).session is None

    def mergeable(self) -> list[Any]:
        """Return the objects of no session that still have their columns; SQLAlchemy expires some."""
        return [
            customer
            for customer in self.objects
            if inspect(customer).session is None and "id" in vars(customer)
        ]

    def pending(self) -> list[Any]:
        return [customer for customer in self.objects if inspect(customer).pending]

    def addable(self) -> list[Any]:
        return [
            customer
            for customer in self.mergeable()
            if inspect(customer).transient and customer not in self.merged
        ]

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
        """Give the events of what was added in this level, or merged, back to it; they keep their order."""
        back = [*self.merged, *(customer for n, customer in level if not n and inspect(customer).transient)]
        for n, customer in level:
            if n and customer in back:
                self.carried[customer].append(n)
        for events in self.carried.values():
            events.sort()

    def expunge_what_has_no_row(self) -> None:
        """Part with what SQLAlchemy holds for persistent: it was flushed in a savepoint inside the one undone."""
        with self.session.no_autoflush:
            rows = self.session.execute(text("SELECT id FROM customer")).scalars().all()
        for customer in [*self.session]:
            if inspect(customer).identity[0] not in rows:
                self.session.expunge(customer)
                if customer in self.objects:
                    self.objects.remove(customer)


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
