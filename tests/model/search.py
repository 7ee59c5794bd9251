"""A breadth-first search through every order of events in the model, and the shortest way to a broken promise."""

from __future__ import annotations

from array import array
from itertools import pairwise
from typing import NamedTuple

from tests.model.world import AS_IT_IS, NOBODY, Broken, Rules, World, check, faults, is_settled, steps


class Found(NamedTuple):
    """What a search has come to; `broken` says what and how, or is empty."""

    states: int
    depth: int
    broken: str = ""


def search(start: World, rules: Rules = AS_IT_IS) -> Found:
    """Visit every state; stop at the first that breaks the promise, or from which nobody comes to rest."""
    seen = {start: 0}
    worlds, parents, depth = [start], array("l", [-1]), array("l", [0])
    before, after = array("l"), array("l")  # what relays can do undisturbed, from and to which state
    place = 0
    while place < len(worlds):
        world = worlds[place]
        try:
            for next_to, moves in ((True, steps(world, rules)), (False, faults(world, rules))):
                for _, _, reached in moves:
                    reached = _same(reached)
                    number = seen.get(reached)
                    if number is None:
                        number = seen[reached] = len(worlds)
                        worlds.append(reached)
                        parents.append(place)
                        depth.append(depth[place] + 1)
                        check(reached)
                    if next_to:
                        before.append(place)
                        after.append(number)
        except Broken as broken:
            last = place if str(broken).find("passed") > 0 else len(worlds) - 1
            return Found(len(worlds), depth[last], _tell(worlds, parents, last, rules, str(broken)))
        place += 1
    stuck = _stuck(worlds, before, after)
    if stuck is not None:
        text = _tell(worlds, parents, stuck, rules, "from here, nobody ever comes to rest")
        return Found(len(worlds), depth[stuck], text)
    return Found(len(worlds), max(depth))


def _same(world: World) -> World:
    """Return the one of two worlds that differ in the relays' names only."""
    one, two = world.relays
    return world if hash(one) <= hash(two) else world._replace(relays=(two, one))


def _stuck(worlds: list[World], before: array[int], after: array[int]) -> int | None:
    """Return the first state from which no undisturbed way leads to rest."""
    ways: list[list[int]] = [[] for _ in worlds]
    for one, two in zip(before, after, strict=True):
        ways[two].append(one)
    todo = [number for number, world in enumerate(worlds) if is_settled(world)]
    fine = bytearray(len(worlds))
    for number in todo:
        fine[number] = 1
    while todo:
        for number in ways[todo.pop()]:
            if not fine[number]:
                fine[number] = 1
                todo.append(number)
    return next((number for number, is_fine in enumerate(fine) if not is_fine), None)


def _tell(worlds: list[World], parents: array[int], last: int, rules: Rules, end: str) -> str:
    """Return the way to a state in words, with the relays' names kept through it."""
    way = []
    while last >= 0:
        way.append(worlds[last])
        last = parents[last]
    way.reverse()
    names, lines = ["A", "B"], []
    for world, following in pairwise(way):
        for who, text, reached in (*steps(world, rules), *faults(world, rules)):
            if _same(reached) == following:
                lines.append(text if who == NOBODY else f"relay {names[who]} {text}")
                if _same(reached).relays != reached.relays:
                    names.reverse()
                break
    return "\n".join([*(f"{number:3} {line}" for number, line in enumerate(lines, 1)), f"    {end}"])
