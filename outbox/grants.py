"""Who may do what: the least rights of each role, as SQL for PostgreSQL and as users of Redis.

| role | in PostgreSQL | in Redis |
|---|---|---|
| service | adds events; sees of them only whether an id waits | nothing |
| relay | moves events between the outbox's own tables | adds to the lanes, keeps its state |
| reader | sees numbers, ages and streams; no payload, headers, key or error | sees numbers, and the lanes' entries |
| consumer | its inbox | reads the lanes, acknowledges, moves what fails |
| operator | reads dead letters, moves them back or deletes them | the same with those of consumers |
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import LiteralString

import psycopg
from psycopg import errors as pg
from psycopg import sql

from outbox.errors import DatabaseUnavailable, InvalidSetting, NotMigrated, OutboxError, first_line
from outbox.event import Recorded
from outbox.lanes import STREAM_NAME, Lanes
from outbox.store import connection_arguments

Rights = dict[str, dict[LiteralString, tuple[str, ...]]]  # table, right: the columns, or () for all

RIGHTS: dict[str, Rights] = {
    "service": {
        # The insert does nothing where the id waits already, and must read the id for that. The rest has
        # defaults, which need no right: a service cannot choose its place in the order.
        "outbox": {"INSERT": Recorded.__struct_fields__, "SELECT": ("event_id",)},
    },
    "relay": {
        "outbox": {"SELECT": (), "INSERT": (), "DELETE": ()},
        "outbox_relay": {
            "SELECT": (),
            "INSERT": ("partition",),
            "UPDATE": ("batch", "asleep", "leader", "led_at", "streams_lost", "batches_lost"),
        },
        "outbox_journal": {"SELECT": (), "INSERT": (), "DELETE": (), "UPDATE": ("published_at",)},
        "outbox_dead": {
            "SELECT": (),
            "INSERT": (),
            "DELETE": (),
            "UPDATE": ("attempts", "reason", "died_at"),
        },
    },
    "reader": {
        "outbox": {
            "SELECT": (
                "id",
                "event_id",
                "stream",
                "type",
                "priority",
                "created_at",
                "available_at",
                "attempts",
            ),
        },
        "outbox_relay": {"SELECT": ()},
        "outbox_journal": {"SELECT": ("partition", "batch", "events", "published_at")},
        "outbox_dead": {
            "SELECT": ("event_id", "stream", "type", "priority", "created_at", "attempts", "died_at"),
        },
    },
    "consumer": {
        "outbox_inbox": {"SELECT": (), "INSERT": (), "DELETE": ()},
    },
    "operator": {
        "outbox": {
            "SELECT": ("event_id",),
            "INSERT": ("event_id", "stream", "type", "key", "priority", "created_at", "payload", "headers"),
        },
        "outbox_relay": {"SELECT": ("partition",)},
        "outbox_dead": {"SELECT": (), "DELETE": ()},
    },
}

CONNECTS = ("client|setname", "select")
READS = (*CONNECTS, "info", "hgetall", "xlen", "xinfo|groups", "xpending", "xrange", "time")
COMMANDS: dict[str, tuple[str, ...]] = {
    "relay": (
        *("eval", "evalsha", "xadd", "xinfo|stream", "hget", "hset", "hexists", "hdel"),
        "xtrim",
        *READS,
    ),
    "reader": READS,
    "consumer": (
        *("eval", "evalsha", "xadd", "xread", "xreadgroup", "xrange", "xrevrange", "xack", "xpending"),
        *("xclaim", "xautoclaim", "xinfo", "xgroup|create", "xgroup|delconsumer"),
        *CONNECTS,
    ),
    "operator": ("eval", "evalsha", "xadd", "xinfo|groups", *CONNECTS),
}
OF_DEAD_LETTERS = ("+xdel", "+xrange", "+xrevrange")  # an operator's, who may do so with no entry of a lane
NOT_GRANTED = "01007"  # a warning: who ran the statement has some right, but not that to give it away
# Redis refuses this as it stands, so that nobody has a user whose password everybody knows.
PASSWORD = "#sha256-of-the-password"  # noqa: S105


def statements(roles: Mapping[str, str], *, schema: str = "public") -> Iterator[sql.Composed]:
    """Yield the statements that give the rights of each role to the PostgreSQL role that plays it.

    They may be repeated, and take no right away. One PostgreSQL role may play several.
    """
    for role, name in roles.items():
        grantee = sql.Identifier(name)
        yield sql.SQL("GRANT USAGE ON SCHEMA {} TO {}").format(sql.Identifier(schema), grantee)
        for table, rights in RIGHTS[role].items():
            yield sql.SQL("GRANT {} ON {} TO {}").format(
                sql.SQL(", ").join(_right(right, columns) for right, columns in rights.items()),
                sql.Identifier(schema, table),
                grantee,
            )


def _right(right: LiteralString, columns: Iterable[str]) -> sql.Composable:
    names = sql.SQL(", ").join(map(sql.Identifier, columns))
    return sql.SQL("{} ({})").format(sql.SQL(right), names) if columns else sql.SQL(right)


def apply(url: str, given: Iterable[sql.Composed]) -> None:
    """Run the statements in one transaction, as a user who owns the tables.

    Raises DatabaseUnavailable, NotMigrated, or OutboxError for a role that does not exist or a lack of rights.
    """
    try:
        with psycopg.connect(**connection_arguments(url, takeover_seconds=5.0)) as connection:
            warnings: list[str | None] = []
            connection.add_notice_handler(lambda notice: warnings.append(notice.sqlstate))
            for statement in given:
                connection.execute(statement)
                # The use of a schema that is somebody else's, as public is, is everybody's already.
                if NOT_GRANTED in warnings and "ON SCHEMA" not in statement.as_string():
                    raise OutboxError(
                        "PostgreSQL: this role may not give all these rights; the tables' owner may"
                    )
                warnings.clear()
    except psycopg.OperationalError as error:
        raise DatabaseUnavailable(f"PostgreSQL: {first_line(error)}") from error
    except (pg.UndefinedTable, pg.InvalidSchemaName) as error:
        raise NotMigrated(f"{first_line(error)}; run: outbox-relay migrate") from error
    except psycopg.Error as error:
        raise OutboxError(f"PostgreSQL: {first_line(error)}; no right was given") from error


def redis_users(
    roles: Mapping[str, str], *, prefix: str, streams: Iterable[str], rule: Lanes
) -> Iterator[str]:
    """Yield the commands that make a user of Redis for each role; the hash of its password is to be filled in.

    Without `streams` the user may use every key. An operator needs Redis 7. Raises InvalidSetting for a name that
    Redis would split.
    """
    names = list(streams)
    for role, user in roles.items():
        of_consumers = role in ("consumer", "operator")
        # A consumer and `dlq` know no lanes=off: they use both lanes of each stream.
        lanes = _lanes(names, Lanes(suffix=rule.suffix) if of_consumers else rule)
        for name in (user, *lanes):
            if not STREAM_NAME.fullmatch(name):
                raise InvalidSetting(
                    f"{name!r} can be no name here: letters, digits or any of _ . : / {{ }} -"
                )
        dead = [f"~{lane}:dlq" for lane in lanes]
        more = dead if of_consumers else [f"~{prefix}:*"]
        keys = [*(f"~{lane}" for lane in lanes), *more] if lanes else ["~*"]
        commands = [f"+{command}" for command in COMMANDS[role]]
        if role == "operator":
            # Who looks for all dead letters sees the names of all keys.
            commands += [] if lanes else ["+scan"]
            commands.append(f"({' '.join([*(dead or ['~*:dlq']), *OF_DEAD_LETTERS])})")
        yield " ".join(["ACL SETUSER", user, "reset", "on", PASSWORD, *keys, *commands])


def _lanes(streams: Iterable[str], rule: Lanes) -> list[str]:
    """Return the lanes of streams, each once."""
    both = ((name, rule.lane(name, rule.threshold - 1)) for name in streams)
    return list(dict.fromkeys(lane for pair in both for lane in pair))
