"""The transitions, read from ``lua/`` once.

Each is declared here with the number of its keys; a test holds the declaration and the script's own header together.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass, field
from functools import cache
from importlib import resources

__all__ = ["SCRIPTS", "Script", "script"]

_INCLUDE = re.compile(r"^--# include (\w+)$", re.MULTILINE)
_COMMENT = re.compile(r"^\s*--.*\n", re.MULTILINE)

#: The name of every transition, with the names of the keys that it takes.
SCRIPTS: dict[str, tuple[str, ...]] = {
    "trigger": ("record", "waiting", "meta", "timers"),
    "admit": ("record", "waiting", "meta", "timers", "seen"),
    "start": ("record", "waiting", "meta", "timers", "presence", "held"),
    "check": ("record", "waiting", "meta", "timers"),
    "finish": ("record", "waiting", "meta", "timers", "held", "drains"),
    "retry": ("record", "waiting", "meta", "timers", "held"),
    "requeue": ("record", "waiting", "meta", "timers", "held"),
    "carry": ("record", "waiting", "meta", "timers"),
    "rollback": ("record", "waiting", "meta", "timers"),
    "unpublished": ("record", "waiting", "meta", "timers"),
    "withdraw": ("record", "waiting", "meta", "timers"),
    "wake": ("record", "waiting", "meta", "timers"),
    "lose": ("record", "waiting", "meta", "timers", "presence", "held of the dead", "held of the sweeper"),
    "clear": ("record", "waiting", "meta", "timers"),
    "heartbeat": ("meta", "presence", "timers", "drains"),
    "overdue": ("meta", "presence", "timers", "drains"),
    "bury": ("presence", "held"),
    "show": ("record", "waiting", "meta", "timers"),
}


@dataclass(frozen=True)
class Script:
    """One transition, ready to be called."""

    name: str
    keys: tuple[str, ...]
    text: str
    sha: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha1(self.text.encode(), usedforsecurity=False).hexdigest()
        object.__setattr__(self, "sha", digest)


def _read(*path: str) -> str:
    return resources.files(__package__).joinpath("lua", *path).read_text("utf-8")


@cache
def script(name: str) -> Script:
    """Return a transition by name, its includes put in."""
    text = _INCLUDE.sub(lambda found: _read("lib", f"{found.group(1)}.lua"), _read(f"{name}.lua"))
    return Script(name, SCRIPTS[name], _COMMENT.sub("", text))
