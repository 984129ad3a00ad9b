"""The transitions, read from ``lua/`` once.

Each is declared here with the number of its keys; a test holds the declaration and the script's own header together.

A script makes all of its functions each time that it is called, which takes a third of its time. So the ones that every
call and run asks for are offered to the server as functions of its own too (https://redis.io/docs/latest/develop/
programmability/functions-intro), which are made once. Their text is derived from the script's, and means the same.
"""

from __future__ import annotations

import hashlib
import re
import textwrap
from dataclasses import dataclass, field
from functools import cache, cached_property
from importlib import resources

__all__ = ["PASSING", "SCRIPTS", "Script", "script"]

_INCLUDE = re.compile(r"^( *)--# include (\w+)$", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*\n", re.MULTILINE)
#: Stands between a library and what comes after it.
_LEVEL = "!\n"
_FUNCTION = re.compile(r"^local function (\w+)\(.*?^end\n", re.MULTILINE | re.DOTALL)
#: Of what stands outside of functions: a constant, which is made once; and a local variable, with or without a value.
_CONSTANT = re.compile(r"^local [A-Z][A-Z_, ]* = [^\n]*\n(?:[ }][^\n]*\n)*", re.MULTILINE)
_VARIABLE = re.compile(r"^local ([\w, ]+?)( =|$)", re.MULTILINE)
_MADE_ONCE = re.compile(f"{_FUNCTION.pattern}|{_CONSTANT.pattern}", re.MULTILINE | re.DOTALL)

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
#: Those that every call and every run asks for.
OFTEN = frozenset({"trigger", "publish", "start", "finish"})


@dataclass(frozen=True)
class Script:
    """One transition, ready to be called."""

    name: str
    keys: tuple[str, ...]
    #: What is sent, but for the order in which its functions are made.
    source: str
    #: Whether what it changes has to outlive a failover.
    lasting: bool
    text: str = field(init=False)
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "text", _nested(self.source))
        object.__setattr__(self, "sha", _digest(self.text))

    @cached_property
    def function(self) -> str | None:
        """The name of the server's function that means the same, ``None`` if it is not worth one.

        Its text is part of the name: another version's is another function.
        """
        return f"celery_coalesce_{self.name}_{self.sha[:12]}" if self.name in OFTEN else None

    @cached_property
    def library(self) -> str:
        """The library that makes it."""
        return _library(str(self.function), self.source.replace(_LEVEL, ""))


def _digest(text: str) -> str:
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


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


def _library(name: str, text: str) -> str:
    """Return the library of a function that does what a script does.

    The script's functions and constants (in capitals) are made as the library is loaded, and all else is done in each
    call. Variables are the library's, and have the values that the script gives them from the beginning of a call on;
    one without a value keeps what it had. Nothing may rely on that: it lasts as long as the server's process, or
    shorter.
    """
    made, done, end = ["local KEYS, ARGV\n"], [], 0

    def variable(found: re.Match[str]) -> str:
        made.append(f"local {found.group(1)}\n")
        return f"{found.group(1)} =" if found.group(2) else ""

    for once in _MADE_ONCE.finditer(text):
        done.append(_VARIABLE.sub(variable, text[end : once.start()]))
        made.append(once.group())
        end = once.end()
    done.append(_VARIABLE.sub(variable, text[end:]))
    call = textwrap.indent("".join(done), "  ")
    call = f"redis.register_function('{name}', function(keys, argv)\n  KEYS, ARGV = keys, argv\n{call}end)\n"
    return f"#!lua name={name}\n{''.join(made)}{call}"


@cache
def script(name: str) -> Script:
    """Return a transition by name, its includes put in, and nothing in it that it does not need."""
    source = _needed(_COMMENT.sub("", _included(_read(f"{name}.lua"))))
    return Script(name, SCRIPTS[name], source, name not in PASSING)
