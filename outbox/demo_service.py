"""The service of the demo: an airline imports the airports of the world, and goes on selling seats meanwhile.

First comes what a service needs to know of outbox: its events, what records them, and the handler of a consumer that
tells the customers, exactly once. Then what puts it under load. `demo` runs it as four processes:

    python -m outbox.demo_service import | trade | consume
"""

from __future__ import annotations

import itertools
import json
import os
import select
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

import airportsdata
from sqlalchemy import create_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from outbox import Consumer, Domain, Priority, Received, RecordsEvents, event, processing_priority, publish

# -- the service: its events, its aggregates, its commands, its handler ----------------------------

STREAM = "airline"
GROUP = "customers"  # of the consumers


@event(stream=STREAM, key="country")
@dataclass(frozen=True)
class AirportRegistered:
    country: str
    number: int  # counts the events of its key, so that their order can be checked
    icao: str
    name: str
    city: str


@event(stream=STREAM, key="booking")
@dataclass(frozen=True)
class BookingChanged:
    booking: str
    number: int
    state: str


@event(stream=STREAM, key="icao")
@dataclass(frozen=True)
class RunwayClosed:
    icao: str
    number: int


class Base(DeclarativeBase):
    pass


class Airport(RecordsEvents, Base):
    __tablename__ = "airport"
    icao: Mapped[str] = mapped_column(primary_key=True)
    name: Mapped[str]

    @classmethod
    def register(cls, number: int | None, data: Mapping[str, Any]) -> Airport:
        """Make an airport, with an event if it has a number: if airlines fly to it."""
        airport = cls(icao=data["icao"], name=data["name"])
        if number is not None:
            airport.record(
                AirportRegistered(data["country"], number, airport.icao, airport.name, data["city"])
            )
        return airport


class Booking(RecordsEvents, Base):
    __tablename__ = "booking"
    id: Mapped[str] = mapped_column(primary_key=True)
    state: Mapped[str]
    number: Mapped[int]

    def change(self, state: str) -> int:
        self.state = state
        self.number += 1
        self.record(BookingChanged(self.id, self.number, state))
        return self.number


class Notice(Base):
    """What the customers are told of an event; told twice, it would be two rows."""

    __tablename__ = "notice"
    id: Mapped[int] = mapped_column(primary_key=True)
    key: Mapped[str]
    number: Mapped[int]
    at: Mapped[float]  # by the clock of the machine


@dataclass(frozen=True)
class ImportAirports:
    records: Sequence[tuple[int | None, Mapping[str, Any]]]


@dataclass(frozen=True)
class BookSeat:
    booking: str


@dataclass(frozen=True)
class ChangeBooking:
    booking: str
    state: str


@dataclass(frozen=True)
class CloseRunway:
    icao: str
    number: int


sessions = sessionmaker()
domain = Domain(sessions)


@domain.handles(ImportAirports)
def import_airports(command: ImportAirports, session: Session) -> None:
    session.add_all([Airport.register(number, record) for number, record in command.records])


@domain.handles(BookSeat)
def book_seat(command: BookSeat, session: Session) -> int:
    booking = Booking(id=command.booking, number=0)
    session.add(booking)
    return booking.change("booked")


@domain.handles(ChangeBooking)
def change_booking(command: ChangeBooking, session: Session) -> int:
    # Writers of one booking take turns on its row, so its events are in the stream as they happened.
    return session.get_one(Booking, command.booking, with_for_update=True).change(command.state)


@domain.handles(CloseRunway)
def close_runway(command: CloseRunway, session: Session) -> int:
    publish(session, RunwayClosed(command.icao, command.number))
    return command.number


def tell_customers(event: Received, session: Session) -> None:
    session.add(Notice(key=event.key, number=event.data.number, at=time.time()))


# -- the load: two processes that tell on their standard output what they have committed -----------

CHUNK = 200  # airports in a transaction
RATE = 60  # commands a second besides the import
HUBS = ("EDDF", "EGLL", "FAOR", "KJFK", "OMDB", "RJTT", "SBGR", "YSSY")


class Kind(NamedTuple):
    """A kind of event: what it is called, and its priority where priorities are on."""

    name: str
    priority: Priority


ALERT = Kind("alerts", Priority.CRITICAL)
PAYMENT = Kind("payments", Priority.HIGH)
BOOKING = Kind("bookings", Priority.NORMAL)
IMPORT = Kind("import", Priority.BULK)
KINDS = {kind.name: kind for kind in (ALERT, PAYMENT, BOOKING, IMPORT)}


def import_all(lanes: bool) -> None:
    """Import the airports of the world, under low priority."""
    records = airports()
    with processing_priority(Priority.BULK) if lanes else nullcontext():
        for start in range(0, len(records), CHUNK):
            chunk = records[start : start + CHUNK]
            domain.process(ImportAirports(chunk))
            tell(IMPORT, [(record["country"], number) for number, record in chunk if number is not None])


def airports() -> list[tuple[int | None, Mapping[str, Any]]]:
    """Return all airports; those that airlines fly to (they have an IATA code) are numbered in each country."""
    counted: Counter[str] = Counter()
    found: list[tuple[int | None, Mapping[str, Any]]] = []
    for record in airportsdata.load().values():
        counted[record["country"]] += bool(record["iata"])
        found.append((counted[record["country"]] if record["iata"] else None, record))
    return found


def trade(lanes: bool) -> None:
    """Book, pay, board and close runways at a steady rate, from a word on standard input until its end."""
    sys.stdin.readline()
    start = time.monotonic()
    for count, (kind, key, command) in enumerate(traffic()):
        pause = start + count / RATE - time.monotonic()
        if select.select([sys.stdin], [], [], max(0.0, pause))[0]:
            return
        number = domain.process(command, priority=kind.priority if lanes else None)
        tell(kind, [(key, number)])


def traffic() -> Iterator[tuple[Kind, str, object]]:
    """Yield commands without end: each booking is made, then paid, then boarded; some are always open."""
    for number in itertools.count(1):
        yield BOOKING, f"B{number}", BookSeat(f"B{number}")
        if number > 20:
            yield PAYMENT, f"B{number - 20}", ChangeBooking(f"B{number - 20}", "paid")
        if number > 40:
            yield BOOKING, f"B{number - 40}", ChangeBooking(f"B{number - 40}", "boarded")
        hub = HUBS[number % len(HUBS)]
        yield ALERT, hub, CloseRunway(hub, number)


def tell(kind: Kind, events: Sequence[tuple[str, int]]) -> None:
    """Tell the parent of a commit, and when it was."""
    print(json.dumps([kind.name, time.time(), events]), flush=True)


# -- the processes -------------------------------------------------------------------------------------------


def consume() -> None:
    """Be one of the consumers, until SIGTERM."""
    consumer = Consumer(
        os.environ["OUTBOX_REDIS_URL"],
        group=GROUP,
        streams=[STREAM],
        sessions=sessions,
        name=consumer_name(os.getpid()),
        claim_idle=timedelta(
            seconds=2
        ),  # the default would make the demo wait for what a dead one had in hand
    )
    consumer.on_any(tell_customers)
    consumer.run()


def consumer_name(pid: int) -> str:
    """Return the name within the group of the consumer that is this process."""
    return f"consumer-{pid}"


def main(role: str) -> None:
    """Be one of the processes, on the servers in the environment."""
    sessions.configure(bind=create_engine(os.environ["OUTBOX_DATABASE_URL"]))
    if role == "consume":
        consume()
    else:
        produce({"import": import_all, "trade": trade}[role])


def produce(load: Any) -> None:
    """Be one of the two producers."""
    parent = os.getppid()
    try:
        load(os.environ["OUTBOX_LANES"] == "on")
    except Exception as error:
        if isinstance(error, BrokenPipeError) or os.getppid() != parent:
            os._exit(1)  # the parent has gone, and the servers with it: nobody is left to tell
        raise


if __name__ == "__main__":
    main(sys.argv[1])
