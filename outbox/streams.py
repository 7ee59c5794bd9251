"""Every Redis command of the relay, and the scripts. It knows Redis and no SQL.

| key | type | what it means |
|---|---|---|
| `<prefix>:<outbox id>` | hash | the state: what Redis knows of the outbox |
| ... `batch` | | number of the last batch that was added |
| ... `ids` | | the rows of that batch that were added, for a successor to adopt |
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
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import msgpack
import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

from outbox.errors import DamagedBatch, InvalidEvent, InvalidSetting, RedisUnavailable, Unsuitable
from outbox.event import ENVELOPE, HEADER_NAME, Waiting, check_stream

log = logging.getLogger("outbox.streams")

# States of the server, or a lack of rights to run the command at all: no event is to blame.
# (Redis puts these words at the start of an error, or after "@user_script: 12: -" before version 7.)
SERVER_STATES = (
    "OOM", "READONLY", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "MISCONF", "NOREPLICAS", "BUSY", "NOAUTH",
    "MOVED", "ASK", "TRYAGAIN", "CROSSSLOT", "NOSCRIPT", "UNBLOCKED",
)  # fmt: skip

HEAD = """
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
local function remember(lane, entry)
    local _, count = newest(lane)
    redis.call('HSET', KEYS[1], 'last:' .. lane, entry .. ' ' .. (count or 0))
end
-- A lane that was deleted or evicted starts over: at an older entry than our last, or at a smaller count.
local function went_back(lane)
    local last = redis.call('HGET', KEYS[1], 'last:' .. lane)
    if not last then return false end
    local entry, count = newest(lane)
    if not entry then return false end
    local ms, number, added = string.match(last, '(%d+)-(%d+) (%d+)')
    local now_ms, now_number = string.match(entry, '(%d+)-(%d+)')
    ms, number, now_ms, now_number = tonumber(ms), tonumber(number), tonumber(now_ms), tonumber(now_number)
    return now_ms < ms or (now_ms == ms and now_number < number) or (count or math.huge) < tonumber(added)
end
""".replace("STATES", "{'" + "', '".join(SERVER_STATES) + "'}")

# Answers OK, AHEAD, BEHIND, FENCED or GONE. Writes nothing but for OK, and then all or what Redis takes.
# A server refuses every write of a script or none, so an error of the server's state comes before any write.
PUBLISH = (
    HEAD
    + """
local expected = tonumber(ARGV[1])
local batch = tonumber(redis.call('HGET', KEYS[1], 'batch') or 0)
if batch == expected + 1 then
    return {'AHEAD', redis.call('HGET', KEYS[1], 'ids') or ''}
elseif batch < expected then
    return {'BEHIND', batch}
elseif batch > expected then
    return {'FENCED', batch}
end

local gone = {'GONE'}
for i = 2, #KEYS do
    if redis.call('HEXISTS', KEYS[1], 'restored:' .. KEYS[i]) == 1 or went_back(KEYS[i]) then
        gone[#gone + 1] = KEYS[i]
    end
end
if #gone > 1 then return gone end

local body = cmsgpack.unpack(ARGV[4])
local source, events = body[1], body[3]
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
            added[#added + 1] = event[3]
        end
    end
end
redis.call('HSET', KEYS[1], 'batch', ARGV[2],
    'ids', #answer == 1 and ARGV[3] or table.concat(added, ' '))
for i, entry in pairs(last) do remember(KEYS[i], entry) end
return answer
"""
)

# Adds the events of one lane out of one journal batch to a lane that has been lost. KEYS: the state, then the
# lanes of the body. ARGV: expected batch, lane, number of the journal batch (0 with the last call), body.
# Answers OK, FENCED, or GONE when the lane has been lost again meanwhile: then it is to be filled from the start.
RESTORE = (
    HEAD
    + """
local lane, number = ARGV[2], tonumber(ARGV[3])
local batch = tonumber(redis.call('HGET', KEYS[1], 'batch') or 0)
if batch ~= tonumber(ARGV[1]) then return {'FENCED', batch} end
local progress = 'restored:' .. lane
local done = redis.call('HGET', KEYS[1], progress)
if done and went_back(lane) then
    redis.call('HDEL', KEYS[1], progress)
    return {'GONE', lane}
end
if number == 0 then
    if not done then redis.call('HDEL', KEYS[1], 'last:' .. lane) end
    redis.call('HDEL', KEYS[1], progress)
    return {'OK'}
elseif number <= tonumber(done or 0) then
    return {'OK'}
end
local body = cmsgpack.unpack(ARGV[4])
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
if newest_entry then
    remember(lane, newest_entry)
elseif not done then
    redis.call('HDEL', KEYS[1], 'last:' .. lane)
end
return answer
"""
)

MAX_PAYLOAD = 64 * 1024 * 1024  # Redis drops a connection that sends more than its proto-max-bulk-len
EVICTING = ("allkeys-lru", "allkeys-lfu", "allkeys-random", "allkeys-lrm")


class Batch(NamedTuple):
    """The encoded events of a batch, the lanes they go to, and their rows."""

    lanes: list[str]
    ids: str
    body: bytes


class Added(NamedTuple):
    """OK: the batch is in Redis, but for what it refused (place in the batch, why) or held back (place)."""

    refused: dict[int, str]
    held: list[int]


class Ahead(NamedTuple):
    """The batch with the next number is there already, and these rows are in it."""

    ids: list[int]


class Behind(NamedTuple):
    """Redis knows fewer batches; 0 when it knows none."""

    batch: int


class Fenced(NamedTuple):
    """Redis knows later batches: there is a newer leader."""

    batch: int


class Gone(NamedTuple):
    """These lanes have lost their entries while the state survived."""

    lanes: list[str]


Answer = Added | Ahead | Behind | Fenced | Gone


class Streams:
    """The relay's Redis: one connection that never sends anything again by itself.

    `prefix` begins the name of the state's key; with a hash tag (`{shop}:outbox`) the state shares a slot
    with streams of that tag. Methods raise RedisUnavailable for whatever no event is to blame for.
    """

    def __init__(self, url: str, *, prefix: str = "outbox", timeout_seconds: float = 2.0) -> None:
        try:
            pool = redis.ConnectionPool.from_url(
                url,
                socket_timeout=timeout_seconds,
                socket_connect_timeout=timeout_seconds,
                retry=Retry(NoBackoff(), 0),
                client_name="outbox-relay",
            )
            # What a URL says of the form of answers is for others: the scripts' are read as bytes.
            pool.connection_kwargs |= {"protocol": 2, "decode_responses": False}
            if issubclass(pool.connection_class, redis.Connection):  # a Unix socket knows no keepalive
                pool.connection_kwargs.setdefault("socket_keepalive", True)
            pool.connection_class(**pool.connection_kwargs)  # refuses an unknown option; connects to nothing
        except (ValueError, TypeError, redis.RedisError):
            # What is wrong with it is not said: it may be a part of the password.
            raise InvalidSetting(
                "redis_url: this is no URL, or has an option that is none of redis-py's"
            ) from None
        self._redis = redis.Redis.from_pool(pool)
        self._prefix = prefix
        self._warned = False
        self._scripts = {script: self._redis.register_script(script).sha for script in (PUBLISH, RESTORE)}

    def publish(self, outbox_id: str, expected: int, batch: Batch, following: int | None = None) -> Answer:
        """Add a batch, if Redis stands at `expected`; it then stands at `following` (default: the next)."""
        number = expected + 1 if following is None else following
        answer = self._call(PUBLISH, outbox_id, batch, expected, number, batch.ids, batch.body)
        return _answer(answer)

    def restore(self, outbox_id: str, expected: int, lane: str, number: int, batch: Batch) -> Answer:
        """Add what a journal batch holds of a lane that was lost; with number 0, the lane is whole again."""
        return _answer(self._call(RESTORE, outbox_id, batch, expected, lane, number, batch.body))

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
        """Return the number of the last batch that Redis knows, and the lanes it has added to."""
        with self._translated():
            state: dict[Any, Any] = self._redis.hgetall(f"{self._prefix}:{outbox_id}")
        lanes = [name[5:].decode() for name in state if name.startswith(b"last:")]
        return int(state.get(b"batch", 0)), sorted(lanes)

    def lengths(self, lanes: Sequence[str]) -> dict[str, int | None]:
        """Return the number of entries in each lane: 0 where there is no key, None where it is no stream."""
        with self._translated():
            return {lane: self._length(lane) for lane in lanes}

    def _length(self, lane: str) -> int | None:
        try:
            return int(self._redis.xlen(lane))
        except redis.ResponseError:
            return None

    def close(self) -> None:
        """Drop the connection; the next call opens another."""
        self._redis.connection_pool.disconnect()

    def _call(self, script: str, outbox_id: str, batch: Batch, *arguments: Any) -> list[Any]:
        keys = [f"{self._prefix}:{outbox_id}", *batch.lanes]
        with self._translated():
            try:
                return self._eval(script, keys, arguments)
            except redis.exceptions.NoPermissionError:
                # Redis judges all the keys of a call at once; one lane must not hold up the others.
                usable = [key if self._may_use(key) else keys[0] for key in keys]
                if usable == keys:
                    raise
                return self._eval(script, usable, arguments)

    def _eval(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> list[Any]:
        try:
            answer = self._redis.evalsha(self._scripts[script], len(keys), *keys, *arguments)
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


def redis_in_clear(url: str) -> list[str]:
    """Return the host that a connection speaks to in clear text; an empty name for a socket."""
    pool = redis.ConnectionPool.from_url(url)
    encrypted = issubclass(pool.connection_class, redis.SSLConnection)
    return [] if encrypted else [str(pool.connection_kwargs.get("host", ""))]


def encode(source: str, events: Sequence[Waiting], lane: Callable[[str, int], str]) -> Batch:
    """Encode a batch; `lane` tells the lane of a stream and a priority. Every event must be `publishable`."""
    lanes: dict[str, int] = {}
    groups: dict[tuple[str, str], int] = {}
    encoded = []
    for event in events:
        name = lane(event.stream, event.priority)
        place = lanes.setdefault(name, len(lanes) + 2)
        group = 0
        correlation = None
        more: tuple[str, ...] = ()
        if event.key is not None:
            group = groups.setdefault((event.stream, event.key), len(groups) + 1)
            more = ("subject", event.key)
        if event.headers is not None:
            headers = json.loads(event.headers)
            correlation = headers.pop("correlationid", None)
            more = (*more, *(part for header in headers.items() for part in header))
        encoded.append(
            (place, group, str(event.id), event.event_id, event.type, _time(event.created_at),
             str(event.priority), event.payload, correlation, *more)
        )  # fmt: skip
    names = list(lanes)
    ids = " ".join([str(event.id) for event in events])
    return Batch(names, ids, msgpack.packb([source, names, encoded]))


EMPTY = Batch([], "", msgpack.packb(["", [], []]))


def decode(body: bytes) -> tuple[Batch, list[Waiting]]:
    """Return a journal's body as a batch, and its events as far as the body tells. Raises DamagedBatch."""
    try:
        source, lanes, events = msgpack.unpackb(body)
        _check_shape(source, lanes, events)
        batch = Batch(lanes, " ".join(event[2] for event in events), body)
        return batch, [_waiting(lanes, event) for event in events]
    except (ValueError, TypeError, msgpack.UnpackException) as error:
        raise DamagedBatch(f"{error or error.__class__.__name__}") from error


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


def publishable(event: Waiting) -> str | None:
    """Return why an event cannot be an entry of a stream, or None. Rows may have been written by hand."""
    try:
        check_stream(event.stream)
    except InvalidEvent as error:
        return str(error)
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


def _time(created_at: str) -> str:
    """Return PostgreSQL's text of a time in UTC as RFC 3339."""
    return created_at.replace(" ", "T", 1).replace("+00", "Z")


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
            return Added(
                {part[0]: part[1].decode(errors="replace") for part in rest if len(part) == 2},
                [part[0] for part in rest if len(part) == 1],
            )
        case b"AHEAD":
            return Ahead([int(row) for row in rest[0].split()])
        case b"BEHIND":
            return Behind(rest[0])
        case b"FENCED":
            return Fenced(rest[0])
        case b"GONE":
            return Gone([lane.decode() for lane in rest])
    raise RedisUnavailable(f"Redis: an answer that no script of the outbox gives: {word!r}")
