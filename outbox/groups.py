"""Every Redis command of a consumer, and its scripts. It knows consumer groups and no SQL.

| key | type | what it means |
|---|---|---|
| `<stream>`, `<stream>:backfill` | stream | the lanes; each has the consumer group, created at 0 |
| ... pending entries of the group | | what was given to a consumer and is not finished; Redis counts the deliveries |
| `<lane>:dlq` | stream | dead letters: the entry's own fields, and the `dlq:` ones below |

| field of a dead letter | what it means |
|---|---|
| `dlq:group` | the consumer group that has given up |
| `dlq:error` | why |
| `dlq:deliveries` | how often the group was given it |
| `dlq:entry` | its entry id in the lane: when it was published |
| `dlq:died_at` | when it was given up, RFC 3339 |

Methods are coroutines that never suspend when the client is a blocking one (`finish` runs them then), so that there
is one implementation for both. All but `wait` are one script each: what they look at and what they do is one moment.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NamedTuple

import redis

from outbox.errors import RedisUnavailable
from outbox.loop import settled
from outbox.streams import connection_pool

DEAD = ":dlq"  # suffix of the stream of a lane's dead letters
FOR_GROUP = b"dlq:group"  # in an entry of a lane: a replayed dead letter, which is for this group alone

# KEYS: the lanes, primary ones first. ARGV: group, consumer, number of primary lanes, count, turn, and then what
# to ack first: lane and entry id in pairs. Reads up to `count` entries of each primary lane; only if there are
# none, one entry of one backfill lane. With nothing to give it answers with the newest entry id of each lane, for
# `wait`. `turn` is the backfill lane that is asked first; -1 leaves backfill alone.
NEXT = """
local group, consumer = ARGV[1], ARGV[2]
local primaries, count, turn = tonumber(ARGV[3]), ARGV[4], tonumber(ARGV[5])
for i = 6, #ARGV, 2 do redis.call('XACK', KEYS[tonumber(ARGV[i])], group, ARGV[i + 1]) end
local function read(first, last, count)
    local command = {'XREADGROUP', 'GROUP', group, consumer, 'COUNT', count, 'STREAMS'}
    for i = first, last do command[#command + 1] = KEYS[i] end
    for _ = first, last do command[#command + 1] = '>' end
    return redis.call(unpack(command))
end
local found = read(1, primaries, count)
if found then return found end
local backfills = #KEYS - primaries
if turn >= 0 then
    for i = 0, backfills - 1 do
        local lane = primaries + 1 + (turn + i) % backfills
        found = read(lane, lane, 1)
        if found then return found end
    end
end
local newest = {'EMPTY'}
for i = 1, #KEYS do
    local last = redis.call('XREVRANGE', KEYS[i], '+', '-', 'COUNT', 1)
    newest[i + 1] = last[1] and last[1][1] or '0-0'
end
return newest
"""

HEAD = """
local lane, group, consumer, id = KEYS[1], ARGV[1], ARGV[2], ARGV[3]
local pending = redis.call('XPENDING', lane, group, id, id, 1)[1]
if not pending or pending[2] ~= consumer then return {'GONE'} end
local entry = redis.call('XRANGE', lane, id, id)[1]
if not entry then
    redis.call('XACK', lane, group, id)
    return {'LOST'}
end
"""
# Gives a pending entry once more to its consumer, and counts the delivery. GONE: somebody else has finished it, or
# has claimed it. LOST: somebody has deleted it.
TAKE = (
    HEAD
    + """
redis.call('XCLAIM', lane, group, consumer, 0, id)
return {'TAKEN', pending[4] + 1, entry[2]}
"""
)
# Moves a pending entry to the dead letters, and acks it. KEYS: lane, dead letters. ARGV: ..., more fields.
BURY = (
    HEAD
    + """
local fields = entry[2]
if #fields > 4000 then fields = {} end  -- of a foreign hand: more than Lua can pass on; it stays in the lane
for i = 4, #ARGV do fields[#fields + 1] = ARGV[i] end
redis.call('XADD', KEYS[2], '*', unpack(fields))
redis.call('XACK', lane, group, id)
return {'BURIED'}
"""
)
# Makes entries count as just delivered, if the consumer still has them; answers with those that it has not, and
# with those that somebody has deleted, which are not pending any more then. ARGV: group, consumer, entry ids.
RENEW = """
local gone, lost = {}, {}
for i = 3, #ARGV do
    local pending = redis.call('XPENDING', KEYS[1], ARGV[1], ARGV[i], ARGV[i], 1, ARGV[2])
    if #pending == 0 then
        gone[#gone + 1] = ARGV[i]
    elseif #redis.call('XCLAIM', KEYS[1], ARGV[1], ARGV[2], 0, ARGV[i], 'JUSTID') == 0 then
        lost[#lost + 1] = ARGV[i]
    end
end
return {gone, lost}
"""
# Removes consumers that have nothing pending: the one that is named, or all others that were idle for so long.
# ARGV: group, consumer, idle milliseconds, or none.
FORGET = """
for _, lane in ipairs(KEYS) do
    local consumers = redis.pcall('XINFO', 'CONSUMERS', lane, ARGV[1])
    for _, info in ipairs(consumers.err and {} or consumers) do
        local found = {}
        for i = 1, #info, 2 do found[info[i]] = info[i + 1] end
        local meant = found.name == ARGV[2]
        if ARGV[3] then meant = not meant and found.idle >= tonumber(ARGV[3]) end
        if meant and found.pending == 0 then
            redis.call('XGROUP', 'DELCONSUMER', lane, ARGV[1], found.name)
        end
    end
end
"""
SCRIPTS = (NEXT, TAKE, BURY, RENEW, FORGET)


class GroupMissing(RedisUnavailable):
    """Raised when a lane or its consumer group is gone: Redis was restarted empty, or somebody has deleted it."""


@dataclass(slots=True, eq=False)
class Entry:
    """An entry that was given to this consumer, for the `deliveries`-th time; 0: it is to be delivered once more.

    `since`: a time of the monotonic clock just before its delivery. `interrupted`: how often PostgreSQL has ended its
    handler.
    """

    lane: str
    id: str
    fields: dict[bytes, bytes]
    deliveries: int
    since: float = 0.0
    interrupted: int = 0


class Found(NamedTuple):
    """What `next` has found; with nothing found, the newest entry ids, for `wait`."""

    entries: list[Entry]
    newest: list[bytes]


class Claimed(NamedTuple):
    """What `claim` has claimed, and what it found deleted; it goes on at `start`, or has seen all at "0-0"."""

    start: str
    ids: list[str]
    lost: list[str]


class Lost(NamedTuple):
    """A pending entry that somebody has deleted from its stream."""

    lane: str
    id: str


class Connection:
    """One connection, of asyncio if `asynchronous`, that never sends anything again by itself.

    Methods raise RedisUnavailable for whatever no event is to blame for, and InvalidSetting for a wrong URL.
    """

    def __init__(
        self,
        url: str,
        scripts: Iterable[str],
        *,
        asynchronous: bool = False,
        timeout_seconds: float = 5.0,
        name: str = "outbox-consumer",
    ) -> None:
        library: Any = importlib.import_module("redis.asyncio" if asynchronous else "redis")
        self._redis = library.Redis.from_pool(connection_pool(library, url, name, timeout_seconds))
        self._redis.response_callbacks.clear()  # replies come as Redis gives them, as they do out of a script
        self._scripts = {script: self._redis.register_script(script).sha for script in scripts}

    async def close(self) -> None:
        """Drop the connection; the next call opens another."""
        await settled(self._redis.connection_pool.disconnect())

    async def _script(self, script: str, keys: Sequence[str], *arguments: Any) -> Any:
        try:
            return await self._run("EVALSHA", self._scripts[script], len(keys), *keys, *arguments)
        except _ScriptMissing:
            return await self._run("EVAL", script, len(keys), *keys, *arguments)

    async def _run(self, *command: Any) -> Any:
        return await self._do(self._redis.execute_command, *command)

    async def _do(self, method: Callable[..., Any], *arguments: Any) -> Any:
        """Call a method of redis-py; drop the connection after any error, as a reply may come late."""
        try:
            return await settled(method(*arguments))
        except redis.exceptions.NoScriptError as error:
            raise _ScriptMissing(str(error)) from error
        except redis.RedisError as error:
            await self.close()
            missing = "NOGROUP" in str(error)
            raise (GroupMissing if missing else RedisUnavailable)(
                f"Redis: {str(error).rstrip('.')}"
            ) from error
        except BaseException:
            await self.close()
            raise


class Groups(Connection):
    """One worker's connection to its group in all lanes, and a second one that reads ahead while primary is busy.

    Methods raise GroupMissing until `create` is called.
    """

    def __init__(
        self,
        url: str,
        *,
        group: str,
        consumer: str,
        primary: Sequence[str],
        backfill: Sequence[str],
        asynchronous: bool = False,
        timeout_seconds: float = 5.0,
    ) -> None:
        self.lanes = [*primary, *backfill]
        self._group, self._consumer = group, consumer
        self._primaries, self._turn = len(primary), 0
        self._read_primary = ["STREAMS", *primary, *(">" for _ in primary)]
        self._busy = False  # the last read found entries of a primary lane
        self._asked_at: float | None = None  # when `ask` has sent what `more` has not read the answer of
        self._place = {lane: place for place, lane in enumerate(self.lanes, 1)}
        super().__init__(url, SCRIPTS, asynchronous=asynchronous, timeout_seconds=timeout_seconds)
        pool = self._redis.connection_pool
        self._ahead = pool.connection_class(**pool.connection_kwargs)  # connects when it is used

    async def close(self) -> None:
        """Drop both connections; the next call opens others."""
        self._asked_at = None
        await settled(self._ahead.disconnect())
        await super().close()

    def is_primary(self, lane: str) -> bool:
        """Return whether a lane is a primary one."""
        return self._place[lane] <= self._primaries

    async def create(self) -> list[str]:
        """Create the group in each lane where it is missing, from the first entry on; return those lanes."""
        created = []
        for lane in self.lanes:
            try:
                await self._run("XGROUP", "CREATE", lane, self._group, "0", "MKSTREAM")
                created.append(lane)
            except RedisUnavailable as error:
                if "BUSYGROUP" not in str(error):
                    raise
        return created

    async def ask(self, count: int) -> None:
        """Ask for up to `count` more entries of each primary lane, and do not wait: `more` reads the answer."""
        asked_at = time.monotonic()
        with suppress(RedisUnavailable):  # `more` will see
            await self._do(self._ahead.send_command, *self._read_command(count))
            self._asked_at = asked_at

    async def more(self, count: int) -> list[Entry]:
        """Read up to `count` entries of each primary lane, if the last read has found any there.

        A script that returns a hundred entries is twice as slow as the command.
        """
        if not self._busy:
            return []
        if self._asked_at is not None:
            found = await self.rest()
        else:
            since = time.monotonic()
            found = _entries(await self._run(*self._read_command(count)) or [], since)
        self._busy = bool(found)
        return found

    async def rest(self) -> list[Entry]:
        """Return what was asked for and has not been read."""
        if (since := self._asked_at) is None:
            return []
        self._asked_at = None
        return _entries(await self._do(self._ahead.read_response) or [], since)

    def _read_command(self, count: int) -> Sequence[Any]:
        return ("XREADGROUP", "GROUP", self._group, self._consumer, "COUNT", count, *self._read_primary)

    async def next(self, count: int, done: Mapping[str, Sequence[str]], *, backfill: bool = True) -> Found:
        """Ack what is done; read up to `count` entries of each primary lane, or else one of backfill."""
        self._turn += 1
        since = time.monotonic()
        acks = [part for lane, ids in done.items() for id_ in ids for part in (self._place[lane], id_)]
        answer = await self._script(
            NEXT, self.lanes, self._group, self._consumer, self._primaries, count,
            self._turn if backfill else -1, *acks,
        )  # fmt: skip
        if answer[0] == b"EMPTY":
            return Found([], answer[1:])
        self._busy = self.is_primary(answer[0][0].decode())
        return Found(_entries(answer, since), [])

    async def wait(self, newest: Sequence[bytes], seconds: float) -> None:
        """Block until there is an entry in any lane after these, or for that long. Takes nothing."""
        if self._asked_at is None:
            await settled(self._ahead.disconnect())  # an idle one might be found dead when it is needed again
        # Redis answers before the client gives up, which a URL may want soon; 0 would block for ever.
        timeout = self._redis.connection_pool.connection_kwargs["socket_timeout"]
        milliseconds = max(1, int(min(seconds, timeout / 2) * 1000))
        await self._run("XREAD", "COUNT", 1, "BLOCK", milliseconds, "STREAMS", *self.lanes, *newest)

    async def ack(self, done: Mapping[str, Sequence[str]]) -> None:
        """Tell Redis that entries are finished; may be repeated."""
        for lane, ids in done.items():
            await self._run("XACK", lane, self._group, *ids)

    async def take(self, lane: str, id_: str) -> Entry | Lost | None:
        """Deliver a pending entry of ours once more; None: somebody else has finished or claimed it."""
        since = time.monotonic()
        answer = await self._script(TAKE, [lane], self._group, self._consumer, id_)
        if answer[0] == b"TAKEN":
            return Entry(lane, id_, pairs(answer[2]), answer[1], since)
        return Lost(lane, id_) if answer[0] == b"LOST" else None

    async def bury(self, entry: Entry, error: str, died_at: str) -> bool | Lost:
        """Move an entry to its lane's dead letters; return whether it was still ours to move, and still there."""
        more = {
            "dlq:group": self._group,
            "dlq:error": error.encode(errors="backslashreplace"),
            "dlq:deliveries": entry.deliveries,
            "dlq:entry": entry.id,
            "dlq:died_at": died_at,
        }
        fields = [part for pair in more.items() for part in pair]
        keys = [entry.lane, entry.lane + DEAD]
        answer = await self._script(BURY, keys, self._group, self._consumer, entry.id, *fields)
        return Lost(entry.lane, entry.id) if answer[0] == b"LOST" else answer[0] == b"BURIED"

    async def renew(self, lane: str, ids: Sequence[str]) -> tuple[list[str], list[str]]:
        """Keep entries ours for longer: a heartbeat. Return those that are not ours any more, and those deleted.

        Before Redis 7, `take` finds the deleted ones.
        """
        gone: list[str] = []
        lost: list[str] = []
        for start in range(0, len(ids), 1000):
            some = ids[start : start + 1000]
            answer = await self._script(RENEW, [lane], self._group, self._consumer, *some)
            gone += map(_text, answer[0])
            lost += map(_text, answer[1])
        return gone, lost

    async def pending(self, lane: str) -> AsyncIterator[str]:
        """Yield the entry ids that are pending for this consumer, oldest first."""
        start = "-"
        while page := await self._run("XPENDING", lane, self._group, start, "+", 1000, self._consumer):
            for row in page:
                yield _text(row[0])
            start = f"({_text(page[-1][0])}"

    async def claim(self, lane: str, idle_seconds: float, start: str) -> Claimed:
        """Claim up to 100 entries whose consumer has been silent for so long, from an entry id on."""
        idle = max(1, int(idle_seconds * 1000))
        answer = await self._run(
            "XAUTOCLAIM", lane, self._group, self._consumer, idle, start, "COUNT", 100, "JUSTID"
        )
        gone = answer[2] if len(answer) > 2 else ()  # before Redis 7, `take` finds them
        return Claimed(_text(answer[0]), [_text(id_) for id_ in answer[1]], [_text(id_) for id_ in gone])

    async def forget(self, idle_seconds: float | None = None) -> None:
        """Remove this consumer, or all others that were silent for so long, where nothing is pending for them."""
        idle = () if idle_seconds is None else (int(idle_seconds * 1000),)
        await self._script(FORGET, self.lanes, self._group, self._consumer, *idle)

    async def oldest_ms(self) -> int | None:
        """Return when the oldest entry of all lanes was published, in Unix milliseconds, or None."""
        first = [await self._run("XRANGE", lane, "-", "+", "COUNT", 1) for lane in self.lanes]
        return min((int(_text(page[0][0]).partition("-")[0]) for page in first if page), default=None)


class _ScriptMissing(RedisUnavailable):
    """Raised when Redis does not know a script yet: it was restarted, or its scripts were flushed."""


def _entries(answer: Sequence[Any], since: float) -> list[Entry]:
    """Return the entries of a reply of XREADGROUP."""
    return [
        Entry(name, id_.decode(), pairs(fields), 1, since)
        for lane, entries in answer
        for name in (lane.decode(),)
        for id_, fields in entries
    ]


def pairs(flat: Iterable[bytes]) -> dict[bytes, bytes]:
    """Return a flat list of names and values as a dict."""
    parts = iter(flat)
    return dict(zip(parts, parts, strict=False))  # Redis gives pairs, and the check would cost as much again


def _text(value: bytes | str) -> str:
    return value.decode() if isinstance(value, bytes) else value
