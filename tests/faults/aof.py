"""Redis' append-only file, and how a power cut shortens it."""

from __future__ import annotations

import os
import random
from pathlib import Path
from typing import NamedTuple

LATELY = 60  # units at the end, of which a power cut may take some


class Unit(NamedTuple):
    """A command, or a script's MULTI with all that it wrote up to EXEC: where each of its commands begins, its end."""

    commands: list[int]
    end: int


def cut_tail(folder: Path, chance: random.Random, inside: bool = False) -> None:
    """Cut the newest part of the append-only file away, at the end of a unit or inside one. Redis must be down."""
    path = max(
        [*folder.glob("appendonlydir/*.incr.aof"), *folder.glob("appendonly.aof")], key=os.path.getmtime
    )
    units = read(path.read_bytes())
    chosen = chance.choice(units[-LATELY:])
    if inside:
        scripts = [unit for unit in units[-LATELY:] if len(unit.commands) > 1]
        end = chance.choice(chance.choice(scripts).commands[1:])
    else:
        end = chosen.commands[0]
    os.truncate(path, end)


def read(log: bytes) -> list[Unit]:
    """Return the units of a log, in order, without a command at its end that a kill has torn."""
    units: list[Unit] = []
    commands: list[int] = []
    place, within = 0, False
    while place < len(log):
        start = place
        try:
            place, word = _command(log, place)
        except ValueError:
            break
        commands.append(start)
        within = word == b"MULTI" or (within and word != b"EXEC")
        if not within:
            units.append(Unit(commands, place))
            commands = []
    return units


def _command(log: bytes, place: int) -> tuple[int, bytes]:
    """Return where the command at a place ends, and its name."""
    parts, place = _number(log, place)
    words = []
    for _ in range(parts):
        length, place = _number(log, place)
        words.append(log[place : place + length])
        place = log.index(b"\r\n", place + length) + 2
    return place, words[0].upper()


def _number(log: bytes, place: int) -> tuple[int, int]:
    """Return the number of a line such as *3 or $11, and where the next line begins."""
    end = log.index(b"\r\n", place)
    return int(log[place + 1 : end]), end + 2
