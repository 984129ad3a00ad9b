"""The transitions, read from ``lua/`` once.

Each is declared here with the number of its keys; a test holds the declaration and the script's own header together.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

__all__ = ["PASSING", "SCRIPTS", "Script", "script"]

_INCLUDE = re.compile(r"^( *)--# include (\w+)$", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*\n", re.MULTILINE)
#: Stands between a library and what comes after it.
_LEVEL = "!\n"
_FUNCTION = re.compile(r"^local function (\w+)\(.*?^end\n", re.MULTILINE | re.DOTALL)

#: What every transition of a record takes first: the record and its waiting runs, the namespace's numbers and timers,
#: what outlives the record, and the constraints.
RECORD = ("record", "waiting", "meta", "timers", "kept", "limits", "slots", "lines", "resting")

#: The name of every transition, with the names of the keys that it takes.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "trigger": RECORD,
    "publish": (*RECORD, "queue"),
    "admit": (*RECORD, "seen"),
    "start": (*RECORD, "presence", "held"),
    "check": RECORD,
    "finish": (*RECORD, "held", "drains", "history"),
    "retry": (*RECORD, "held"),
    "requeue": (*RECORD, "held"),
    "carry": RECORD,
    "rollback": (*RECORD, "drains"),
    "unpublished": RECORD,
    "withdraw": RECORD,
    "advance": RECORD,
    "wake": RECORD,
    "lose": (*RECORD, "presence", "held of the dead", "held of the sweeper"),
    "clear": RECORD,
    "limit": ("timers", "limits", "slots", "lines"),
    "heartbeat": ("meta", "presence", "timers", "drains"),
    "overdue": ("meta", "presence", "timers", "drains"),
    "drain": ("drains", "seen"),
    "bury": ("presence", "held"),
    "hand": ("list",),
    "show": RECORD,
    "keys": ("index",),
    "constraints": ("limits", "slots", "lines", "resting"),
    "history": ("history",),
}


#: Those that change nothing, or nothing that anybody would miss after a failover. The heartbeat is not among them: it
#: finds out whether replicas are there.
PASSING = frozenset({"check", "overdue", "bury", "hand", "show", "keys", "constraints", "history"})


@dataclass(frozen=True)
class Script:
    """One transition, ready to be called."""

    name: str
    keys: tuple[str, ...]
    text: str
    #: Whether what it changes has to outlive a failover.
    lasting: bool
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


def _read(*path: str) -> str:
    return resources.files(__package__).joinpath("lua", *path).read_text("utf-8")


def _included(text: str) -> str:
    def library(found: re.Match[str]) -> str:
        indent, name = found.groups()
        inside = _included(_read("lib", f"{name}.lua"))
        return textwrap.indent(inside, indent) if indent else inside + _LEVEL

    return _INCLUDE.sub(library, text)


def _needed(text: str) -> str:
    """Leave out functions that nothing calls: to make one takes the server time, for each call of the script."""
    kept = text
    # From the last on: a function is called by what comes after it.
    for function in reversed(list(_FUNCTION.finditer(text))):
        if not re.search(rf"\b{function.group(1)}\b", kept[function.end() :]):
            kept = kept[: function.start()] + kept[function.end() :]
    return kept


def _nested(text: str) -> str:
    """Put what comes after a library into a function within it.

    A function finds what it uses of an outer one at once, and what stands beside it (luaF_findupval, Lua 5.1) by going
    through all of that.
    """
    *libraries, inside = text.split(_LEVEL)
    for library in reversed(libraries):
        inside = f"{library}return (function()\n{inside}end)()\n"
    return inside


@cache
def script(name: str) -> Script:
    """Return a transition by name, its includes put in, and nothing in it that it does not need."""
    text = _nested(_needed(_COMMENT.sub("", _included(_read(f"{name}.lua")))))
    return Script(name, SCRIPTS[name], text, name not in PASSING)
