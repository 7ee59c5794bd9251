"""The control: the relay of the textbook, which the harness must catch.

It claims with SKIP LOCKED, adds to Redis with redis-py's pipeline and its defaults, deletes, commits; after any
error of a server it connects again.
With `after publish` as its argument it kills itself between the pipeline and the commit, with `after claim` and
SIGSTOP it freezes before the pipeline.
"""

import os
import signal
import sys
import time

import psycopg
import redis

CLAIM = """
SELECT id, event_id::text, stream, type, key, priority, payload::text FROM outbox
ORDER BY priority DESC, created_at, id LIMIT 50 FOR UPDATE SKIP LOCKED
"""


class Fate:
    """A signal that the relay sends to itself when it has reached a point, once."""

    def __init__(self, point: str = "", name: str = "SIGKILL") -> None:
        self._point, self._signal = point, signal.Signals[name]

    def reached(self, point: str) -> None:
        if point == self._point:
            self._point = ""
            os.kill(os.getpid(), self._signal)


def step(connection: psycopg.Connection, client: redis.Redis, fate: Fate) -> int:
    rows = connection.execute(CLAIM).fetchall()
    if rows:
        fate.reached("after claim")
    with client.pipeline(transaction=False) as pipeline:
        for _, event_id, stream, type_, key, priority, payload in rows:
            lane = stream if priority >= 0 else f"{stream}:backfill"
            fields = {"id": event_id, "type": type_, "subject": key, "priority": priority, "data": payload}
            pipeline.xadd(lane, fields)
        pipeline.execute()
    if rows:
        fate.reached("after publish")
    connection.execute("DELETE FROM outbox WHERE id = ANY (%s)", ([row[0] for row in rows],))
    connection.commit()
    return len(rows)


def main() -> None:
    fate = Fate(*sys.argv[1:])
    while True:
        try:
            relay(fate)
        except (psycopg.Error, redis.RedisError) as error:
            print(error, file=sys.stderr)
            time.sleep(0.1)


def relay(fate: Fate) -> None:
    url = os.environ["OUTBOX_DATABASE_URL"].replace("+psycopg", "")
    with redis.Redis.from_url(os.environ["OUTBOX_REDIS_URL"]) as client, psycopg.connect(url) as connection:
        while True:
            if not step(connection, client, fate):
                time.sleep(0.01)


if __name__ == "__main__":
    main()
