"""The consumer of a soak, for `outbox-relay consume tests.faults.soaked:consumer`; SOAK says in JSON what it is.

Its handler notes that an event took effect, as often as it does. With `leaks` it is the control: it keeps a
descriptor and some memory of each event.
"""

from __future__ import annotations

import json
import os
from datetime import timedelta
from typing import Any

from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session, sessionmaker

import outbox.consumer
from outbox import Consumer
from outbox.event import Received
from tests.acceptance.consumers import CLAIM_IDLE
from tests.acceptance.harness import STREAM

EFFECT = text("INSERT INTO effect VALUES (:event_id)")
LEAKED_BYTES = 300_000

told = json.loads(os.environ["SOAK"])
kept: list[Any] = []


def consumer() -> Consumer:
    # Its hour would keep all that a soak of half an hour writes.
    outbox.consumer.INBOX_MARGIN = timedelta(seconds=told["inbox_margin_seconds"])
    made = Consumer(
        told["redis_url"],
        group="soak",
        streams=[STREAM],
        sessions=sessionmaker(create_engine(told["database_url"])),
        name=told["name"],
        claim_idle=CLAIM_IDLE,
        concurrency=4,
        inbox_retention=timedelta(seconds=1),  # for as long as Redis has the entry, and the margin
    )
    made.on_any(apply)
    return made


def apply(event: Received, session: Session) -> None:
    session.execute(EFFECT, {"event_id": event.id})
    if told["leaks"]:
        kept.append((os.open(os.devnull, os.O_RDONLY), b"\1" * LEAKED_BYTES))
