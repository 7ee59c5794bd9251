"""Every Redis command of the relay, and the scripts. It knows Redis and no SQL.

| key | type | what it means |
|---|---|---|
| `<prefix>:<outbox id>` | hash | the state: what Redis knows of the outbox |
| ... `batch` | | number of the last batch that was added |
| ... `ids:<n>` | | what was added with batch n (the last 64 of them), to be adopted: `<row>:<both ends of its id>` |
| ... `refused` | | events of a batch that was sent again and that Redis refused, until they are dead letters |
| ... `last:<lane>` | | the newest entry that was added to the lane, and how many it had had by then |
| ... `restored:<lane>` | | while a lost lane is filled again: the last journal batch added |
| `<stream>`, `<stream>:backfill` | stream | the lanes; an entry is a CloudEvents 1.0 event in binary mode |

A batch's body is msgpack: `[source, lanes, [[lane, group, row, id, type, time, priority, data, correlation,
name, value, ...], ...]]`. `lane` counts from 2, the lane's place among the script's keys; `group` is one number
for each key (0: no key), so that the script can hold back what must not pass a refused event.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgpack
import redis
from redis.backoff import NoBackoff

from outbox.errors import (
    DamagedBatch,
    InvalidEvent,
    InvalidSetting,
    OutboxError,
    RedisUnavailable,
    Unsuitable,
)
from outbox.event import ENVELOPE, HEADER_NAME, Waiting, check_stream
from outbox.protocol import Added, Ahead, Answer, Behind, Gone, Mark, Refused

log = logging.getLogger("outbox.streams")

# States of the server, or a lack of rights to run the command at all: no event is to blame.
# (Redis puts these words at the start of an error, or after "@user_script: 12: -" before version 7.)
SERVER_STATES = (
    "OOM", "READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "MISCONF", "NOREPLICAS", "BUSY", "NOAUTH",
    "MOVED", "ASK", "TRYAGAIN", "CROSSSLOT", "NOSCRIPT", "UNBLOCKED",
)  # fmt: skip

KEPT = 64  # batches of which Redis remembers what is in them
HEAD_BYTES = 1 << 16  # of a body, where its source and lanes are; one whose head is longer is read as a whole
MARK = re.compile("(-?[0-9]{1,19}):([0-9a-f]{16})")

HEAD = """
-- Who sends again learns of refusals before anything else happens: they outlive a crash of the relay in here.
local refusals = redis.call('HGET', KEYS[1], 'refused')
if refusals then return {'REFUSED', refusals} end
local function remember_refusals(number, answer)
    if #answer == 1 then return end
    answer[1] = number
    redis.call('HSET', KEYS[1], 'refused', cmsgpack.pack(answer))
    answer[1] = 'OK'
end

-- Anybody may have written into the state: nothing but digits is a number of ours.
local function number_of(field)
    local text = redis.call('HGET', KEYS[1], field) or '0'
    return #text < 16 and string.find(text, '^%d+$') and tonumber(text)
end
local batch = number_of('batch')
if not batch then
    return redis.error_reply('ERR the batch of ' .. KEYS[1] .. ' is no number; it is the highest n of its ids:<n>')
end

-- Else the events would be added, the state not written, and the next try would add them again.
local function check_rights()
    redis.call('HSET', KEYS[1], 'batch', batch)
    redis.call('HDEL', KEYS[1], '')
end

local function is_state(message)
    for _, word in ipairs(STATES) do
        if string.find(message, '%f[%a]' .. word .. '%f[%A]') then return true end
    end
    return string.find(message, 'permissions? to run') or string.find(message, 'can.t run this command')
end

-- A lane that we may not use stands among the keys as the state's own: see `Streams._call`.
local function add(source, event)
    if KEYS[event[1]] == KEYS[1] then return {err = 'NOPERM the user of the relay may not use this key'} end
    return redis.pcall('XADD', KEYS[event[1]], '*', 'specversion', '1.0', 'id', event[4], 'source', source,
        'type', event[5], 'time', event[6], 'datacontenttype', 'application/json', 'priority', event[7],
        'data', event[8], 'correlationid', event[9] or event[4], unpack(event, 10))
end

-- The newest entry that a lane has had and how many in all (nil before Redis 7); nothing if it is no stream.
local function newest(lane)
    local info = redis.pcall('XINFO', 'STREAM', lane)
    if info.err then
        if string.find(info.err, 'no such key') then return '0-0', 0 end
        return nil
    end
    local found = {}
    for i = 1, #info, 2 do found[info[i]] = info[i + 1] end
    return found['last-generated-id'], found['entries-added']
end
local function remember(lane, entry, count)
    if not count then
        local _, now = newest(lane)
        count = now or 0
    end
    redis.call('HSET', KEYS[1], 'last:' .. lane, entry .. ' ' .. count)
end
-- A lane that was deleted or evicted starts over: at an older entry than our last, or at a smaller count. Returned
-- besides is how many entries the lane has had, if it was looked at.
local function went_back(lane)
    local last = redis.call('HGET', KEYS[1], 'last:' .. lane)
    local ms, number, added = string.match(last or '', '^(%d+)-(%d+) (%d+)$')
    if not ms then return false end
    local entry, count = newest(lane)
    if not entry then return false end
    local now_ms, now_number = string.match(entry, '(%d+)-(%d+)')
    ms, number, now_ms, now_number = tonumber(ms), tonumber(number), tonumber(now_ms), tonumber(now_number)
    local back = now_ms < ms or (now_ms == ms and now_number < number) or (count or math.huge) < tonumber(added)
    return back, count
end
-- Or it is being filled again, which may have been given up in the middle.
local function is_lost(lane)
    local back, count = went_back(lane)
    return back or redis.call('HEXISTS', KEYS[1], 'restored:' .. lane) == 1, count
end
""".replace("STATES", "{'" + "', '".join(SERVER_STATES) + "'}")

# KEYS: the state, then the lanes of the body. ARGV: expected batch, the batch to stand at then, "look" (add nothing),
# "new" or "again" (from the journal), its ids, and the body.
# Answers OK, AHEAD, BEHIND, GONE or REFUSED. Writes nothing but for OK, and then all or what Redis takes.
# A server refuses every write of a script or none, so an error of the server's state comes before any write; and a user
# who may not write the state learns it before any event is added.
PUBLISH = (
    HEAD
    + """
local expected = tonumber(ARGV[1])
if batch > expected then
    local ahead = {'AHEAD', batch}
    for n = math.max(expected, batch - KEPT) + 1, batch do
        local ids = redis.call('HGET', KEYS[1], 'ids:' .. n)
        if ids then ahead[#ahead + 1] = {n, ids} end
    end
    return ahead
elseif batch < expected then
    return {'BEHIND', batch}
end

local gone, counts = {'GONE'}, {}
for i = 2, #KEYS do
    local lost, count = is_lost(KEYS[i])
    counts[i] = count
    if lost then gone[#gone + 1] = KEYS[i] end
end
if #gone > 1 then return gone end
if ARGV[3] == 'look' then return {'OK'} end

local body = cmsgpack.unpack(ARGV[5])
local source, events = body[1], body[3]
check_rights()
local last, added, answer, stopped = {}, {}, {'OK'}, {}
for i, event in ipairs(events) do
    local group = event[2]
    if stopped[group] then
        answer[#answer + 1] = {i - 1}
    else
        local entry = add(source, event)
        if entry.err then
            if #added == 0 and is_state(entry.err) then return redis.error_reply(entry.err) end
            if group > 0 then stopped[group] = true end
            answer[#answer + 1] = {i - 1, entry.err}
        else
            last[event[1]] = entry
            if counts[event[1]] then counts[event[1]] = counts[event[1]] + 1 end
            added[#added + 1] = event
        end
    end
end
local ids = ARGV[4]
if #answer > 1 then
    for i, event in ipairs(added) do
        added[i] = event[3] .. ':' .. string.sub(event[4], 1, 8) .. string.sub(event[4], -8)
    end
    ids = table.concat(added, ' ')
end
redis.call('HSET', KEYS[1], 'batch', ARGV[2], 'ids:' .. ARGV[2], ids)
for n = expected - KEPT + 1, math.min(expected, tonumber(ARGV[2]) - KEPT) do
    redis.call('HDEL', KEYS[1], 'ids:' .. n)
end
for i, entry in pairs(last) do remember(KEYS[i], entry, counts[i]) end
if ARGV[3] == 'again' then remember_refusals(tonumber(ARGV[2]), answer) end
return answer
"""
).replace("KEPT", str(KEPT))

# Adds the events of one lane out of one journal batch to a lane that has been lost. KEYS: the state, then the
# lanes of the body. ARGV: expected batch, lane, the journal batch that this relay sent before it (0: none), number of
# the journal batch (0 with the last call), body.
# Answers OK, REFUSED, BEHIND when Redis stands elsewhere, or GONE when the lane has been lost again meanwhile, or was
# filled by another relay: then it is to be looked at again. The batch number does not tell a zombie here, how far the
# filling has come does.
RESTORE = (
    HEAD
    + """
local lane, before, number = ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
if batch ~= tonumber(ARGV[1]) then return {'BEHIND', batch} end
local progress = 'restored:' .. lane
local done = redis.call('HGET', KEYS[1], progress)
if done and went_back(lane) then
    redis.call('HDEL', KEYS[1], progress)
    return {'GONE', lane}
elseif not done and not went_back(lane) then
    return {'OK'}
elseif (number_of(progress) or 0) < before then
    return {'GONE', lane}
end
if number == 0 then
    if not done then redis.call('HDEL', KEYS[1], 'last:' .. lane) end
    redis.call('HDEL', KEYS[1], progress)
    return {'OK'}
elseif number <= (number_of(progress) or 0) then
    return {'OK'}
end
local body = cmsgpack.unpack(ARGV[5])
check_rights()
local answer, newest_entry = {'OK'}, nil
for i, event in ipairs(body[3]) do
    if KEYS[event[1]] == lane then
        local entry = add(body[1], event)
        if entry.err then
            if not newest_entry and is_state(entry.err) then return redis.error_reply(entry.err) end
            answer[#answer + 1] = {i - 1, entry.err}
        else
            newest_entry = entry
        end
    end
end
redis.call('HSET', KEYS[1], progress, number)
remember_refusals(number, answer)
if newest_entry then
    remember(lane, newest_entry)
elseif not done then
    redis.call('HDEL', KEYS[1], 'last:' .. lane)
end
return answer
"""
)

# Forgets the refusals that are dead letters, and no later ones. KEYS: the state. ARGV: the note of them.
FORGET = """
if redis.call('HGET', KEYS[1], 'refused') == ARGV[1] then redis.call('HDEL', KEYS[1], 'refused') end
return {'OK'}
"""

# Answers the batch at which Redis stands, and which of the lanes have lost their entries, or are being filled again.
# KEYS: the state, lanes.
STANDS = (
    HEAD
    + """
local answer = {batch}
for i = 2, #KEYS do
    if is_lost(KEYS[i]) then answer[#answer + 1] = KEYS[i] end
end
return answer
"""
)

# Drops the entries of a lane that all its groups have finished, if they are older than ARGV[1], a time in Unix
# milliseconds. Without a group nothing is finished. Answers the numbers of groups, of entries dropped, and of all.
TRIM = """
local lane = KEYS[1]
local groups = redis.pcall('XINFO', 'GROUPS', lane)
if groups.err then
    if string.find(groups.err, 'no such key') or string.find(groups.err, 'WRONGTYPE') then return {0, 0, 0} end
    return groups
end
local function parts(id)
    local ms, number = string.match(id, '(%d+)-(%d+)')
    return tonumber(ms), tonumber(number)
end
local function older(one, other)
    local ms, number = parts(one)
    local other_ms, other_number = parts(other)
    return ms < other_ms or (ms == other_ms and number < other_number)
end
local keep, dropped = ARGV[1] .. '-0', 0
for _, info in ipairs(groups) do
    local group = {}
    for i = 1, #info, 2 do group[info[i]] = info[i + 1] end
    local unfinished = group['last-delivered-id']
    if group.pending > 0 then unfinished = redis.call('XPENDING', lane, group.name)[2] end
    if older(unfinished, keep) then keep = unfinished end
end
if #groups > 0 then dropped = redis.call('XTRIM', lane, 'MINID', '~', keep) end
return {#groups, dropped, redis.call('XLEN', lane)}
"""

MAX_PAYLOAD = 64 * 1024 * 1024  # Redis drops a connection that sends more than its proto-max-bulk-len
SOME_LANES = 100  # that are looked at in one call, so that Redis is not held up
EVICTING = ("allkeys-lru", "allkeys-lfu", "allkeys-random", "allkeys-lrm")


class Trimmed(NamedTuple):
    """What `trim` found in a lane: its groups, and how many entries were dropped and are left."""

    groups: int
    dropped: int
    entries: int


class Batch(NamedTuple):
    """The encoded events of a batch, the lanes they go to, and how Redis remembers them."""

    lanes: list[str]
    ids: str
    body: bytes


class Streams:
    """The relay's Redis: one connection that never sends anything again by itself. Not for two threads.

    `prefix` begins the name of the state's key; with a hash tag (`{shop}:outbox`) the state shares a slot
    with streams of that tag. Methods raise RedisUnavailable for whatever no event is to blame for.
    """

    def __init__(self, url: str, *, prefix: str = "outbox", timeout_seconds: float = 2.0) -> None:
        self._redis = redis.Redis.from_pool(connection_pool(redis, url, "outbox-relay", timeout_seconds))
        self._prefix = prefix
        self._warned = False
        self._scripts = {
            script: self._redis.register_script(script).sha
            for script in (TRIM, STANDS, PUBLISH, RESTORE, FORGET)
        }

    def connect(self) -> bool:
        """Open the connection for the calls of this step, if there is none that works; return whether it did.

        A connection ends when Redis does, or fails over. One that is older than the step's lock cannot reach a
        Redis that has forgotten what a successor of ours has published; a new one could. So no step may open
        one after it last knew that it leads, and no call does so by itself.
        """
        with self._translated():
            if self._works():
                return False
            self.close()
            self._redis.connection = self._redis.connection_pool.get_connection()
            return True

    def _works(self) -> bool:
        """Return whether the connection is open, with nothing left in it to read."""
        connection = self._redis.connection
        try:
            return connection is not None and not connection.can_read()
        except (redis.RedisError, OSError):
            return False

    def publish(
        self,
        outbox_id: str,
        expected: int,
        batch: Batch,
        again: int | None = None,
        meanwhile: Callable[[], None] | None = None,
    ) -> Answer:
        """Add a batch, if Redis stands at `expected`; it then stands at the next.

        One of the journal that is sent again brings it to the number `again`. `meanwhile` is called while
        Redis works on the batch.
        """
        number, how = (expected + 1, "new") if again is None else (again, "again")
        arguments = (expected, number, how, batch.ids, batch.body)
        return _answer(self._call(PUBLISH, outbox_id, batch, *arguments, meanwhile=meanwhile))

    def look(self, outbox_id: str, expected: int, batch: Batch) -> Answer:
        """Return what Redis would answer to the batch, but for what it would refuse."""
        return _answer(self._call(PUBLISH, outbox_id, batch, expected, expected, "look"))

    def forget_refusals(self, outbox_id: str, note: bytes) -> None:
        """Clear the note of refused events: they are dead letters, and committed."""
        self._call(FORGET, outbox_id, EMPTY, note)

    def restore(
        self, outbox_id: str, expected: int, lane: str, before: int, number: int, batch: Batch
    ) -> Answer:
        """Add what a journal batch holds of a lane that was lost; with number 0, the lane is whole again.

        `before` is the batch that was sent before this one, 0 with the first.
        """
        return _answer(self._call(RESTORE, outbox_id, batch, expected, lane, before, number, batch.body))

    def check(self) -> None:
        """Make sure that this Redis keeps streams, as far as it tells. Raises Unsuitable with the reason."""
        policy = None
        with self._translated():
            try:
                policy = self._redis.info("memory").get("maxmemory_policy")
            except redis.ResponseError as error:  # no right to ask: no reason not to publish
                if not self._warned:
                    log.warning(
                        "the maxmemory-policy of Redis cannot be read, make sure that it is noeviction: %s",
                        error, extra={"action": "redis_policy_unknown"},
                    )  # fmt: skip
                self._warned = True
        if policy in EVICTING:
            raise Unsuitable(
                f"Redis may evict streams: its maxmemory-policy is {policy}; set it to noeviction "
                "(CONFIG SET maxmemory-policy noeviction)"
            )

    def server(self) -> dict[str, Any]:
        """Return what INFO says of the server; nothing where we have no right to ask."""
        with self._translated():
            try:
                return dict(self._redis.info())
            except redis.ResponseError:
                return {}

    def state(self, outbox_id: str) -> tuple[int, list[str]]:
        """Return the number of the last batch that Redis knows, and the lanes it has added to, or is filling again."""
        with self._translated():
            state: dict[Any, Any] = self._redis.hgetall(f"{self._prefix}:{outbox_id}")
        of_lanes = [name for name in state if name.startswith((b"last:", b"restored:")) and name.isascii()]
        lanes = {name.partition(b":")[2].decode() for name in of_lanes}
        if not (batch := state.get(b"batch", b"0")).isdigit():
            raise RedisUnavailable(f"Redis: the batch of {self._prefix}:{outbox_id} is no number")
        return int(batch), sorted(lanes)

    def purgeable(self, outbox_id: str, lanes: Sequence[str]) -> tuple[int, list[str]]:
        """Return the last batch that Redis has, and which of the lanes it has lost.

        The batch is 0 while the journal is to be read once more: for a lane that is lost, or for an event that was
        refused when it was sent again.
        """
        batch, lost = 0, list[str]()
        for start in range(0, len(lanes) or 1, SOME_LANES):
            some = EMPTY._replace(lanes=[*lanes[start : start + SOME_LANES]])
            batch, *found = self._call(STANDS, outbox_id, some)
            if batch == b"REFUSED":
                return 0, []
            lost += [lane.decode() for lane in found]
        return (0 if lost else batch), lost

    def lengths(self, lanes: Sequence[str]) -> dict[str, int | None]:
        """Return the number of entries in each lane: 0 where there is no key, None where it is no stream."""
        with self._translated():
            return {lane: self._length(lane) for lane in lanes}

    def _length(self, lane: str) -> int | None:
        try:
            return int(self._redis.xlen(lane))
        except redis.ResponseError:
            return None

    def trim(self, lane: str, before_ms: int, *, dry: bool = False) -> Trimmed:
        """Drop what all groups of a lane have finished and is older than a time, a few thousand entries at once.

        With `dry`, look only.
        """
        with self._translated():
            return Trimmed(*self._eval(TRIM, [lane], [0 if dry else before_ms]))

    def close(self) -> None:
        """Drop the connection; `connect` opens another."""
        pool, connection = self._redis.connection_pool, self._redis.connection
        self._redis.connection = None
        if connection:
            pool.release(connection)
        pool.disconnect()

    def _call(
        self,
        script: str,
        outbox_id: str,
        batch: Batch,
        *arguments: Any,
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Any]:
        keys = [f"{self._prefix}:{outbox_id}", *batch.lanes]
        with self._translated():
            try:
                return self._eval(script, keys, arguments, meanwhile)
            except redis.exceptions.NoPermissionError:
                # Redis judges all the keys of a call at once; one lane must not hold up the others.
                usable = [key if self._may_use(key) else keys[0] for key in keys]
                if usable == keys:
                    raise
                return self._eval(script, usable, arguments)

    def _eval(
        self,
        script: str,
        keys: Sequence[str],
        arguments: Sequence[Any],
        meanwhile: Callable[[], None] | None = None,
    ) -> list[Any]:
        call = (self._scripts[script], len(keys), *keys, *arguments)
        try:
            connection = self._redis.connection
            if meanwhile and connection:
                connection.send_command("EVALSHA", *call)  # type: ignore[no-untyped-call]
                meanwhile()
                answer = self._redis.parse_response(connection, "EVALSHA")  # type: ignore[no-untyped-call]
            else:
                answer = self._redis.evalsha(*call)
        except redis.exceptions.NoScriptError:
            answer = self._redis.eval(script, len(keys), *keys, *arguments)
        return list(answer)

    def _may_use(self, key: str) -> bool:
        try:
            self._redis.eval("return 1", 1, key)
        except redis.exceptions.NoPermissionError:
            return False
        return True

    @contextmanager
    def _translated(self) -> Iterator[None]:
        """Drop the connection after any error, a late answer included: it may be for another batch."""
        try:
            yield
        except redis.RedisError as error:
            self.close()
            raise RedisUnavailable(f"Redis: {str(error).rstrip('.')}") from error
        except BaseException:
            self.close()
            raise

    def groups(self, lane: str) -> list[dict[str, Any]] | None:
        """Return how far the consumer groups of a lane are; None where we may not look, or it is no stream.

        `lag`: entries that the group has not been given yet, None if Redis cannot tell; `pending`: those it was
        given and has not finished; `oldest_seconds`: the age of the oldest of both, None if there is none.
        """
        with self._translated():
            try:
                seconds, _ = self._redis.time()
                return [self._group(lane, info, seconds) for info in self._redis.xinfo_groups(lane)]
            except redis.ResponseError as error:
                return [] if "no such key" in str(error) else None

    def _group(self, lane: str, info: dict[str, Any], now_seconds: int) -> dict[str, Any]:
        given = self._redis.xpending(lane, info["name"])
        following: Any = self._redis.xrange(lane, min=f"({info['last-delivered-id'].decode()}", count=1)
        unfinished = [given["min"]] if given["pending"] else []
        unfinished += [entry for entry, _ in following]
        published = [int(entry.partition(b"-")[0]) / 1000 for entry in unfinished]
        return {
            "name": info["name"].decode(errors="backslashreplace"),
            "consumers": info["consumers"],
            "lag": info.get("lag") if following else 0,
            "pending": given["pending"],
            "oldest_seconds": max(0.0, now_seconds - min(published)) if published else None,
        }


def memory_used(info: Mapping[str, Any]) -> float:
    """Return the used share of maxmemory, from 0 to 1, by what INFO says; 0 without a limit, or a right to ask."""
    most = int(info.get("maxmemory", 0))
    return int(info.get("used_memory", 0)) / most if most else 0.0


def connection_pool(library: Any, url: str, name: str, timeout_seconds: float) -> Any:
    """Return a pool of `redis`, or of `redis.asyncio`, whose connections never send anything again by themselves.

    Connects to nothing. Raises InvalidSetting for a wrong URL.
    """
    try:
        pool = library.ConnectionPool.from_url(
            url,
            socket_timeout=timeout_seconds,
            socket_connect_timeout=timeout_seconds,
            retry=library.retry.Retry(NoBackoff(), 0),
            client_name=name,
        )
        # What a URL says of the form of answers is for others: ours are read as bytes.
        pool.connection_kwargs |= {"protocol": 2, "decode_responses": False}
        if issubclass(pool.connection_class, library.Connection):  # a Unix socket knows no keepalive
            pool.connection_kwargs.setdefault("socket_keepalive", True)
        pool.connection_class(**pool.connection_kwargs)  # refuses an unknown option; connects to nothing
    except (ValueError, TypeError, redis.RedisError):
        # What is wrong with it is not said: it may be a part of the password.
        raise InvalidSetting(
            "redis_url: this is no URL, or has an option that is none of redis-py's"
        ) from None
    return pool


def redis_in_clear(url: str) -> list[str]:
    """Return the host that a connection speaks to in clear text; an empty name for a socket."""
    pool = redis.ConnectionPool.from_url(url)
    encrypted = issubclass(pool.connection_class, redis.SSLConnection)
    return [] if encrypted else [str(pool.connection_kwargs.get("host", ""))]


def redis_refused(error: OutboxError) -> bool:
    """Return whether Redis has answered a command with an error, and was not away."""
    return isinstance(error.__cause__, redis.ResponseError)


def encode(source: str, events: Sequence[Waiting], lane: Callable[[str, int], str]) -> Batch:
    """Encode a batch; `lane` tells the lane of a stream and a priority. No event may be among its `faults`."""
    lanes: dict[str, int] = {}
    places: dict[tuple[str, int], tuple[int, str]] = {}
    groups: dict[tuple[str, str], int] = {}
    encoded = []
    times = _times([event.created_at for event in events])
    for event, time in zip(events, times, strict=True):
        row, event_id, stream, type_, key, priority, _, payload, stored, _, _ = event
        if (place := places.get((stream, priority))) is None:
            number = lanes.setdefault(lane(stream, priority), len(lanes) + 2)
            place = places[stream, priority] = number, str(priority)
        group = 0
        correlation = None
        more: tuple[str, ...] = ()
        if key is not None:
            group = groups.setdefault((stream, key), len(groups) + 1)
            more = ("subject", key)
        if stored is not None:
            headers = json.loads(stored)
            correlation = headers.pop("correlationid", None)
            more = (*more, *(part for header in headers.items() for part in header))
        encoded.append(
            (place[0], group, str(row), event_id, type_, time, place[1], payload, correlation, *more)
        )
    names = list(lanes)
    ids = " ".join([f"{event.id}:{event.event_id[:8]}{event.event_id[-8:]}" for event in events])
    return Batch(names, ids, msgpack.packb([source, names, encoded]))


EMPTY = Batch([], "", msgpack.packb(["", [], []]))


def decode(body: bytes) -> tuple[Batch, list[Waiting]]:
    """Return a journal's body as a batch, and its events as far as the body tells. Raises DamagedBatch."""
    try:
        source, lanes, events = msgpack.unpackb(body)
        _check_shape(source, lanes, events)
        batch = Batch(lanes, " ".join(f"{event[2]}:{event[3][:8]}{event[3][-8:]}" for event in events), body)
        return batch, [_waiting(lanes, event) for event in events]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise DamagedBatch(f"{error or error.__class__.__name__}") from error


def may_touch(body: bytes, lanes: Iterable[str]) -> bool:
    """Return whether a journal's body may have events of these lanes, by its head: one that cannot be read may."""
    unpacker = msgpack.Unpacker()
    try:
        unpacker.feed(body[:HEAD_BYTES])  # it takes no more than 100 MiB
        parts, source, found = unpacker.read_array_header(), unpacker.unpack(), unpacker.unpack()
        if parts != 3 or not all(isinstance(name, str) for name in (source, *found)):
            return True
        return not found or not {*lanes}.isdisjoint(found)
    except (ValueError, TypeError, msgpack.UnpackException):
        return True


def _check_shape(source: Any, lanes: Any, events: Any) -> None:
    """Raise ValueError where a body is none of `encode`: the script would fail on it, again and again."""
    strings = [source, *lanes]
    for place, group, *parts in events:
        if place not in range(2, len(lanes) + 2) or type(place) is not int or type(group) is not int:
            raise ValueError("an event of no lane")
        if len(parts) < 7 or len(parts) % 2 == 0:
            raise ValueError("a part of an event is missing")
        strings += [*parts[:6], *parts[7:], parts[6] or ""]
    if not isinstance(lanes, list) or not all(isinstance(part, str) for part in strings):
        raise ValueError("something else than text")


def faults(events: Sequence[Waiting]) -> dict[int, str]:
    """Return why events cannot be entries of a stream, by their places. Rows may have been written by hand."""
    sound = {stream for stream in {event.stream for event in events} if not _stream_fault(stream)}
    return {
        place: fault
        for place, event in enumerate(events)
        if (event.headers is not None or event.stream not in sound or len(event.payload) > MAX_PAYLOAD)
        and (fault := _fault(event))
    }


def _stream_fault(stream: str) -> str | None:
    try:
        check_stream(stream)
    except InvalidEvent as error:
        return str(error)
    return None


def _fault(event: Waiting) -> str | None:
    if fault := _stream_fault(event.stream):
        return fault
    if len(event.payload) > MAX_PAYLOAD:
        return f"payload: more than {MAX_PAYLOAD} characters"
    if event.headers is None:
        return None
    try:
        headers = json.loads(event.headers)
        json.dumps(headers, ensure_ascii=False).encode()
    except (ValueError, RecursionError):
        return "headers: they are nested too deeply, or no text of a stream"
    if not isinstance(headers, dict) or len(headers) > 100:
        return "headers: a JSON object of at most 100 strings is needed"
    for name, value in headers.items():
        if name in ("correlationid", "causationid") and isinstance(value, str):
            continue
        if not HEADER_NAME.fullmatch(name) or name.lower() in ENVELOPE or not isinstance(value, str):
            return f"headers.{name!a}: no name or no text of a header"
    return None


def _times(texts: Sequence[str]) -> list[str]:
    """Return PostgreSQL's texts of times in UTC as RFC 3339."""
    return "\n".join(texts).replace(" ", "T").replace("+00", "Z").split("\n") if texts else []


def _waiting(lanes: list[str], event: list[Any]) -> Waiting:
    place, _, row, event_id, type_, moment, priority, data, correlation, *more = event
    headers = dict(zip(more[::2], more[1::2], strict=True))
    key = headers.pop("subject", None)
    if correlation is not None:
        headers["correlationid"] = correlation
    return Waiting(
        id=int(row),
        event_id=event_id,
        stream=lanes[place - 2],
        type=type_,
        key=key,
        priority=int(priority),
        created_at=moment,
        payload=data,
        headers=json.dumps(headers) if headers else None,
        attempts=0,
        last_error=None,
    )


def _answer(answer: list[Any]) -> Answer:
    word, rest = answer[0], answer[1:]
    match word:
        case b"OK":
            return Added(*_refusals(rest))
        case b"AHEAD":
            kept = {number: _marks(number, ids) for number, ids in rest[1:]}
            return Ahead(rest[0], {number: marks for number, marks in kept.items() if marks is not None})
        case b"BEHIND":
            return Behind(rest[0])
        case b"GONE":
            return Gone([lane.decode() for lane in rest])
        case b"REFUSED":
            return _noted(rest[0])
    raise RedisUnavailable(f"Redis: an answer that no script of the outbox gives: {word!r}")


def _refusals(parts: list[Any]) -> tuple[dict[int, str], list[int]]:
    """Return what was refused (place in the batch, why) and what was held back (place)."""
    refused = {part[0]: part[1].decode(errors="replace") for part in parts if len(part) == 2}
    return refused, [part[0] for part in parts if len(part) == 1]


def _noted(note: bytes) -> Refused:
    """Return the refusals that Redis has noted; those of a batch 0, where somebody has damaged the note."""
    try:
        number, *parts = msgpack.unpackb(note, raw=True)
        refused, held = _refusals(parts)
        if all(type(place) is int for place in (number, *refused, *held)):
            return Refused(number, refused, held, note)
    except (ValueError, TypeError, AttributeError, msgpack.UnpackException):
        pass
    log.error("Redis' note of what it has refused is damaged", extra={"action": "state_damaged"})
    return Refused(0, {}, [], note)


def _marks(batch: int, ids: bytes) -> list[Mark] | None:
    """Return what was added with a batch, or None where somebody has damaged it.

    Nothing is made of a part: a mark that is cut off may be that of another event.
    """
    found = [MARK.fullmatch(mark) for mark in ids.decode(errors="replace").split()]
    marks = [Mark(int(each[1]), each[2]) for each in found if each and abs(int(each[1])) < 2**63]
    if len(marks) == len(found):
        return marks
    log.error("what Redis remembers of batch %d is damaged", batch, extra={"action": "state_damaged"})
    return None
