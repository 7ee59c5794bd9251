"""A breadth-first search through every order of events in the model, and the shortest way to a broken promise."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from struct import Struct
from typing import Any, NamedTuple

from tests.model.world import AS_IT_IS, NOBODY, Broken, Rules, World, check, faults, is_settled, steps


class Found(NamedTuple):
    """What a search has come to; `broken` says what and how, or is empty."""

    states: int
    depth: int
    broken: str = ""


class Parts:
    """The parts that states are made of, numbered: a state is packed into the numbers of its parts.

    Millions of states share thousands of parts. Two worlds that differ in the relays' names only are packed alike.
    """

    def __init__(self, start: World) -> None:
        self._events = start.events
        self._numbers: dict[Any, int] = {}
        self._parts: list[Any] = []
        self._last: Sequence[Any] = _parts(start)
        self._last_numbers: Sequence[int] = [self._number(part) for part in self._last]
        self._struct = Struct(f"{len(self._last)}I")

    def pack(self, world: World) -> bytes:
        """Return the packed world. Quick for one that shares most parts with the world last unpacked."""
        known = zip(_parts(world), self._last, self._last_numbers, strict=True)
        numbers = [number if part is last else self._number(part) for part, last, number in known]
        if numbers[-2] > numbers[-1]:
            numbers[-2:] = numbers[-1], numbers[-2]
        return self._struct.pack(*numbers)

    def unpack(self, packed: bytes) -> World:
        self._last_numbers = self._struct.unpack(packed)
        *fields, one, two = self._last = [self._parts[number] for number in self._last_numbers]
        return World(self._events, *fields, (one, two))

    def _number(self, part: Any) -> int:
        number = self._numbers.setdefault(part, len(self._parts))
        if number == len(self._parts):
            self._parts.append(part)
        return number


def _parts(world: World) -> tuple[Any, ...]:
    return (*world[1:-1], *world.relays)


def search(start: World, rules: Rules = AS_IT_IS) -> Found:
    """Visit every state; stop at the first that breaks the promise, or from which nobody comes to rest."""
    parts = Parts(start)
    states = [parts.pack(start)]
    numbers, parents, settled = {states[0]: 0}, array("l", [-1]), array("I")
    before, after = array("I"), array("I")  # what relays can do undisturbed, from and to which state
    for place, state in enumerate(states):  # which grows on the way
        world, last = parts.unpack(state), place
        try:
            for undisturbed, reached in _moves(world, rules):
                packed = parts.pack(reached)
                number = numbers.setdefault(packed, len(states))
                if undisturbed:
                    before.append(place)
                    after.append(number)
                if number == len(states):
                    states.append(packed)
                    parents.append(place)
                    last = number
                    check(reached)
                    last = place
                    if is_settled(reached):
                        settled.append(number)
        except Broken as broken:
            way = _way(parents, last)
            text = _tell(parts, [states[number] for number in way], rules, str(broken))
            return Found(len(states), len(way) - 1, text)
    stuck = _stuck(len(states), settled, before, after)
    way = _way(parents, len(states) - 1 if stuck is None else stuck)
    text = "from here, nobody ever comes to rest"
    told = "" if stuck is None else _tell(parts, [states[number] for number in way], rules, text)
    return Found(len(states), len(way) - 1, told)


def _moves(world: World, rules: Rules) -> Iterator[tuple[bool, World]]:
    for _, _, reached in steps(world, rules):
        yield True, reached
    for _, _, reached in faults(world, rules):
        yield False, reached


def _stuck(states: int, settled: array[int], before: array[int], after: array[int]) -> int | None:
    """Return the first state from which no undisturbed way leads to rest."""
    # The ways that lead to a state stand in one array, beside those that lead to the next.
    starts = array("I", bytes(4 * (states + 1)))
    for number in after:
        starts[number] += 1
    starts = array("I", accumulate(starts))
    ways = array("I", bytes(4 * len(before)))
    for one, two in zip(before, after, strict=True):
        starts[two] -= 1
        ways[starts[two]] = one
    fine, todo = bytearray(states), [*settled]
    for number in todo:
        fine[number] = 1
    while todo:
        number = todo.pop()
        for one in ways[starts[number] : starts[number + 1]]:
            if not fine[one]:
                fine[one] = 1
                todo.append(one)
    place = fine.find(0)
    return None if place < 0 else place


def _way(parents: array[int], last: int) -> list[int]:
    way = []
    while last >= 0:
        way.append(last)
        last = parents[last]
    return way[::-1]


def _tell(parts: Parts, way: list[bytes], rules: Rules, end: str) -> str:
    """Return a way in words, with the relays' names kept through it."""
    names, lines = ["A", "B"], []
    for state, following in pairwise(way):
        world = parts.unpack(state)
        for who, text, reached in (*steps(world, rules), *faults(world, rules)):
            if parts.pack(reached) == following:
                lines.append(text if who == NOBODY else f"relay {names[who]} {text}")
                if parts.unpack(following).relays != reached.relays:
                    names.reverse()
                break
    return "\n".join([*(f"{number:3} {line}" for number, line in enumerate(lines, 1)), f"    {end}"])
