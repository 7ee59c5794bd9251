"""A consumer as a process, told by its environment what it is: the product with its inbox, or the control.

Either inserts a row for each event that it applies. The control is the consumer of the textbook: it claims with
XAUTOCLAIM what others have left for too long, reads with XREADGROUP, applies each event in a transaction, and acks it
then; after any error of a server it connects again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import redis as redis_client
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session, sessionmaker

from outbox import Consumer
from outbox.report import start_logging
from tests.acceptance.consumers import CLAIM_IDLE, die_at
from tests.acceptance.harness import LANES, STREAM

GROUP = "effects"
APPLY = text("INSERT INTO effect (event_id, consumer) VALUES (:event_id, :consumer)")
DATABASE_URL, REDIS_URL, TOLD = "APPLIER_DATABASE_URL", "APPLIER_REDIS_URL", "APPLIER"
CONTROL_READS = 50  # entries

Apply = Callable[[Session, str], None]


def main() -> None:
    told = json.loads(os.environ[TOLD])
    start_logging("info", "text")
    passes = die_at(told["die_at"], told["by"])

    def apply(session: Session, event_id: str) -> None:
        session.execute(APPLY, {"event_id": event_id, "consumer": told["name"]})
        if told["die_at"] == "in the handler":
            passes()

    run = run_control if told["control"] else run_product
    engine = create_engine(os.environ[DATABASE_URL], connect_args={"application_name": GROUP})
    run(told, sessionmaker(engine), apply)


def run_product(told: dict[str, Any], sessions: sessionmaker[Session], apply: Apply) -> None:
    consumer = Consumer(
        os.environ[REDIS_URL],
        group=GROUP,
        streams=[STREAM],
        name=told["name"],
        sessions=sessions,
        claim_idle=CLAIM_IDLE,
        concurrency=told["concurrency"],
    )
    consumer.on_any(lambda event, session: apply(session, str(event.id)))
    consumer.run()


def run_control(told: dict[str, Any], sessions: sessionmaker[Session], apply: Apply) -> None:
    client = redis_client.Redis.from_url(os.environ[REDIS_URL])
    while True:
        try:
            create_groups(client)
            while True:
                step(client, told["name"], sessions, apply)
        except (DBAPIError, redis_client.RedisError) as error:
            print(error, file=sys.stderr)
            time.sleep(0.1)


def create_groups(client: redis_client.Redis) -> None:
    for lane in LANES:
        with suppress(redis_client.ResponseError):
            client.xgroup_create(lane, GROUP, "0", mkstream=True)


def step(client: redis_client.Redis, name: str, sessions: sessionmaker[Session], apply: Apply) -> None:
    idle_ms = int(CLAIM_IDLE.total_seconds() * 1000)
    handle = partial(handle_all, client, sessions, apply)
    for lane in LANES:
        handle(lane, client.xautoclaim(lane, GROUP, name, idle_ms, count=CONTROL_READS)[1])
    fresh = dict.fromkeys(LANES, ">")
    for lane, entries in client.xreadgroup(GROUP, name, fresh, count=CONTROL_READS, block=100):
        handle(lane.decode(), entries)


def handle_all(
    client: redis_client.Redis, sessions: sessionmaker[Session], apply: Apply, lane: str, entries: list[Any]
) -> None:
    for entry_id, fields in entries:
        with sessions() as session:
            apply(session, fields[b"id"].decode())
            session.commit()
        client.xack(lane, GROUP, entry_id)


if __name__ == "__main__":
    main()
