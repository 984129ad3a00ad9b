"""Transitions as functions of the server's own (Redis 7 and later, Valkey), where it has any and lets us use them.

Whatever is wrong with a function, the script that it was made from does instead: that is older, and known everywhere.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

from redis.exceptions import NoScriptError, ResponseError

from .refusals import NEWER, code_of, is_outage
from .scripts import Script
from .wire import Command

__all__ = ["Functions", "by_script", "failed"]

logger = logging.getLogger("celery_coalesce")

#: Sends commands, and returns their replies.
Run = Callable[[Sequence[Command]], list[Any]]
#: The number of keys, the keys and the arguments of a transition.
What = Sequence[str | bytes | int]


def by_script(run: Run, script: Script, what: What) -> Any:
    """Call a transition as a script; return its reply."""
    [reply] = run([("EVALSHA", script.sha, *what)])
    if isinstance(reply, NoScriptError):
        [reply] = run([("EVAL", script.text, *what)])
    return reply


class Functions:
    """The functions of one server, loaded where they are missing."""

    def __init__(self) -> None:
        self._usable = True
        #: The names of transitions that the server has had a function of.
        self._there: set[str] = set()

    def call(self, run: Run, script: Script, what: What) -> Any:
        """Call a transition, by its function if there is one; return its reply."""
        if not self._usable or script.function is None:
            return by_script(run, script, what)
        command = ("FCALL", script.function, *what)
        [reply] = run([command])
        if failed(reply):
            self._load(run, script)
            [reply] = run([command])
            if failed(reply):
                return self._otherwise(run, script, what, reply)
        self._there.add(script.name)
        return reply

    def _otherwise(self, run: Run, script: Script, what: What, refusal: Any) -> Any:
        """Call the script in the place of a function that was refused, and no function again if that is the reason."""
        answer = by_script(run, script, what)
        if not isinstance(answer, Exception):
            self._give_up(refusal)
        return answer

    def has(self, run: Run, script: Script) -> bool:
        """Return whether the server has a transition's function; load it, if it can be."""
        if script.name in self._there:
            return True
        if not self._usable or script.function is None:
            return False
        self._load(run, script)
        [found] = run([("FUNCTION", "LIST", "LIBRARYNAME", script.function)])
        if isinstance(found, Exception) or not found:
            self._give_up(found)
            return False
        self._there.add(script.name)
        return True

    def lost(self) -> None:
        """Note that functions may have gone which were there."""
        self._there.clear()

    @staticmethod
    def _load(run: Run, script: Script) -> None:
        # Refused if another process was faster, or if there are no functions here: what follows tells.
        run([("FUNCTION", "LOAD", script.library)])

    def _give_up(self, why: object) -> None:
        logger.info("The state server has no functions for us, scripts are used: %s", why, extra={"action": "scripts"})
        self._usable = False


def failed(reply: Any) -> bool:
    """Return whether a reply says that something is wrong with the function, as far as can be told."""
    return isinstance(reply, ResponseError) and not is_outage(reply) and code_of(reply) != NEWER
