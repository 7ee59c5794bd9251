"""Every Redis command on the dead letters of consumers: to read them, and to replay or drop them.

| key | type | what it means |
|---|---|---|
| `<lane>:dlq` | stream | the dead letters of all groups; `groups` has their fields |
| `<lane>` | stream | where a replay puts the entry back, with `dlq:group`: other groups skip it |

An entry of such a stream without `dlq:group` is not ours: it is neither shown nor touched. Everything goes in
pages, and each page is one script, so that a process that is killed has replayed an entry or has not.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import NamedTuple

from outbox.groups import DEAD, Connection, pairs
from outbox.loop import finish

PAGE = 100  # entries

# Walks a page of dead letters. KEYS: dead letters, lane. ARGV: first, last, count, group ('' for all), and the event
# ids (none: all). Answers with the last entry id of the page, and the event ids of what was done and of what was left.
WALK = """
local wanted = {}
for i = 5, #ARGV do wanted[ARGV[i]] = true end
local function is_chosen(group, id)
    return group and (ARGV[4] == '' or ARGV[4] == group) and (#ARGV == 4 or wanted[id])
end
redis.call('XDEL', KEYS[1], '0-0')  -- or who may not would put one back at each try
local last, done, left = '', {}, {}
for _, entry in ipairs(redis.call('XRANGE', KEYS[1], ARGV[1], ARGV[2], 'COUNT', ARGV[3])) do
    local found, own = {}, {}
    for i = 1, #entry[2], 2 do
        local name, value = entry[2][i], entry[2][i + 1]
        found[name] = value
        if string.sub(name, 1, 4) ~= 'dlq:' then
            own[#own + 1] = name
            own[#own + 1] = value
        end
    end
    if is_chosen(found['dlq:group'], found['id']) then
        local place = left
        if DONE then
            redis.call('XDEL', KEYS[1], entry[1])
            place = done
        end
        place[#place + 1] = found['id'] or ''
    end
    last = entry[1]
end
return {last, done, left}
"""
PUT_BACK = """
local groups = redis.pcall('XINFO', 'GROUPS', KEYS[2])
-- The other groups of a lane would skip it, and then it is trimmed. Where there is none, nothing is.
local function is_read_by(group)
    if groups.err or #groups == 0 then return true end
    for _, info in ipairs(groups) do
        if info[2] == group then return true end
    end
    return false
end
local function put_back(own, group)
    if #own == 0 or not is_read_by(group) then return false end  -- an entry may have been too large to be kept here
    own[#own + 1] = 'dlq:group'
    own[#own + 1] = group
    return redis.call('XADD', KEYS[2], '*', unpack(own))
end
"""
REPLAY = PUT_BACK + WALK.replace("DONE", "put_back(own, found['dlq:group'])")
DROP = WALK.replace("DONE", "true")


class DeadLetter(NamedTuple):
    """An entry among the dead letters of a lane."""

    lane: str
    fields: dict[bytes, bytes]

    def text(self, name: str) -> str | None:
        """Return a field; None where there is none."""
        value = self.fields.get(name.encode())
        return None if value is None else readable(value)


class DeadLetters(Connection):
    """The dead letters of these lanes (None: of all) and this consumer group (None: of all)."""

    def __init__(self, url: str, lanes: Sequence[str] | None = None, group: str | None = None) -> None:
        super().__init__(url, (REPLAY, DROP), name="outbox-relay")
        self.left: list[str] = []  # event ids of what could not be put back
        self._lanes, self._group = lanes, group and group.encode()

    def __enter__(self) -> DeadLetters:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        finish(self.close())

    def newest_first(self) -> Iterator[DeadLetter]:
        """Yield dead letters in the order in which they were given up, the last one first."""
        pages = [self._of_lane(lane) for lane in self._all_lanes()]
        for _, letter in heapq.merge(*pages, key=lambda found: found[0], reverse=True):
            yield letter

    def replay(self, event_ids: Sequence[str] | None) -> Iterator[str]:
        """Put dead letters (None: all there are now) back into their lanes; yield the event id of each.

        Only the group that gave up handles it again. The event comes behind what is in the lane. In `left` is what
        stays: of a group that its lane does not have any more, or too large to have been kept whole.
        """
        return self._walk(REPLAY, event_ids)

    def drop(self, event_ids: Sequence[str] | None) -> Iterator[str]:
        """Delete dead letters (None: all there are now); yield the event id of each."""
        return self._walk(DROP, event_ids)

    def _walk(self, script: str, event_ids: Sequence[str] | None) -> Iterator[str]:
        for lane in self._all_lanes() if event_ids is None or event_ids else ():
            keys, first = [lane + DEAD, lane], "-"
            # What fails again while it is replayed comes behind the last one of now, and is left for the next time.
            newest = finish(self._run("XREVRANGE", lane + DEAD, "+", "-", "COUNT", 1))
            while newest:
                arguments = (first, newest[0][0], PAGE, self._group or b"", *(event_ids or ()))
                seen, done, left = finish(self._script(script, keys, *arguments))
                self.left += map(readable, left)
                yield from map(readable, done)
                if not seen:
                    break
                first = f"({seen.decode()}"

    def _of_lane(self, lane: str) -> Iterator[tuple[tuple[int, int], DeadLetter]]:
        last = "+"
        while page := finish(self._run("XREVRANGE", lane + DEAD, last, "-", "COUNT", PAGE)):
            for entry, flat in page:
                fields = pairs(flat)
                if b"dlq:group" in fields and self._group in (None, fields[b"dlq:group"]):
                    yield _place(entry), DeadLetter(lane, fields)
            last = f"({page[-1][0].decode()}"

    def _all_lanes(self) -> list[str]:
        if self._lanes is not None:
            return list(self._lanes)
        cursor, keys = b"0", set()
        while True:
            command = ("SCAN", cursor, "MATCH", f"*{DEAD}", "COUNT", 1000, "TYPE", "stream")
            cursor, found = finish(self._run(*command))
            keys.update(found)
            if cursor == b"0":
                return sorted(key.decode().removesuffix(DEAD) for key in keys if key.isascii())


def readable(value: bytes) -> str:
    """Return bytes as text, whatever they are: anybody may have written them."""
    return value.decode(errors="backslashreplace")


def _place(entry: bytes) -> tuple[int, int]:
    """Return an entry id as what it is ordered by."""
    milliseconds, _, number = entry.partition(b"-")
    return int(milliseconds), int(number)
