"""Which states are equal: those that differ in names alone."""

from __future__ import annotations

import re
from typing import Any

from tests.exploration.snapshots import FIRST, pack, unpack

#: Every number that the scripts gave out, and every made-up name of a process. All are of one length, so that they can
#: be exchanged in packed values.
NUMBERS = re.compile(rb"170000000000\d{4}|18000000000\d{5}")
#: From here on they are names.
NAMES = b"18"
#: The name of a process that was not there before.
NEW = "1800000000099999"

#: The parts of a state; the workers first, so that names are given in their order.
PARTS = ("workers", "sweeper", "producers", "queue", "results", "ghost", "faults", "db")


def normal(state: dict[str, Any]) -> bytes:
    """Pack a state so that states which differ in names alone are equal.

    Numbers that scripts gave out keep their order and nothing else, made-up names not even that; workers are
    interchangeable.
    """
    state["queue"].sort()
    if len(state["workers"]) > 1:
        state["workers"].sort(key=_nameless)
    packed = pack({part: state[part] for part in PARTS})
    found = dict.fromkeys(NUMBERS.findall(packed))
    given = sorted(number for number in found if number < NAMES)
    renamed = {number: b"%d" % (FIRST + rank) for rank, number in enumerate(given)}
    made_up = (number for number in found if number >= NAMES)
    renamed.update({number: b"18000000000%05d" % place for place, number in enumerate(made_up)})
    if all(number == name for number, name in renamed.items()):
        return packed
    changed = unpack(NUMBERS.sub(lambda match: renamed[match.group()], packed))
    db = unpack(changed["db"])
    changed["db"] = pack({name: dict(sorted(db[name].items())) for name in sorted(db)})
    changed["queue"].sort()
    return pack(changed)


def _nameless(worker: list[Any]) -> bytes:
    return re.sub(rb"18000000000\d{5}", b"", pack([worker[2] is None, *worker[1:]]))
