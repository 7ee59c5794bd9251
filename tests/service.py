"""A small service for the tests of the write side: customers that record what happens to them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Engine, String, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from outbox import RecordsEvents, event
from tests.roles import as_owner


class Base(DeclarativeBase):
    pass


@event(stream="customer", key="customer_id")
@dataclass(frozen=True)
class CustomerRegistered:
    customer_id: str
    name: str


@event(stream="customer")
@dataclass(frozen=True)
class Counted:
    n: int


class Customer(RecordsEvents, Base):
    __tablename__ = "customer"
    id: Mapped[str] = mapped_column(String, primary_key=True)
    name: Mapped[str] = mapped_column(String, default="")

    @classmethod
    def register(cls, id: str, name: str = "Ada") -> Customer:
        customer = cls(id=id, name=name)
        customer.record(CustomerRegistered(id, name))
        return customer


def rows(engine: Engine) -> list[Any]:
    """Return the outbox's rows in the order of their ids, payload as text, as their owner sees them."""
    query = text("SELECT *, payload::text AS data FROM outbox ORDER BY id")
    with as_owner(engine).connect() as connection:
        return [*connection.execute(query)]
