"""A task's options, validated all at once.

A :class:`Policy` that exists makes sense: whatever does not is refused when the task is bound to its app, with an
:exc:`~celery_coalesce.errors.OptionError` that names the task, the option, the value and the remedy.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, TypeVar

from .errors import InvalidKey, OptionError
from .keys import KeyTemplate, Parameters, TemplateError
from .states import Mode, Overflow, Rule

#: More runs of one key than this are a mistake.
MOST = 1_000_000

__all__ = ["OPTIONS", "PER_CALL", "Policy"]

#: Every option of a task, with its default.
OPTIONS: dict[str, Any] = {
    "coalesce_key": None,
    "coalesce_scope": None,
    "coalesce": Mode.QUEUE.value,
    "coalesce_max_queued": 1,
    "coalesce_overflow": Overflow.MERGE.value,
    "coalesce_args": Rule.LATEST.value,
    "coalesce_limit": 1,
}

#: Those that one call may override. A scope and a limit are the task's alone: all runs of a key must agree on them.
PER_CALL = frozenset({"coalesce", "coalesce_key", "coalesce_max_queued", "coalesce_overflow", "coalesce_args"})

Merge = Callable[[dict[str, Any], dict[str, Any]], Mapping[str, Any]]
WordT = TypeVar("WordT", bound=Enum)


@dataclass(frozen=True)
class Policy:
    """What a task declared.

    Build one with :meth:`declare`; the fields are then consistent with each other.
    """

    task: str
    scope: str
    parameters: Parameters
    #: ``None``: the whole task is one key.
    key_of: KeyTemplate | Callable[..., str | None] | None
    mode: Mode
    max_queued: int
    overflow: Overflow
    rule: Rule
    merge: Merge | None
    limit: int

    @classmethod
    def declare(cls, task: str, run: Callable[..., Any], bound: bool, options: Mapping[str, Any]) -> Policy:
        """Validate a task's options.

        Args:
            task: The task's name.
            run: Its body.
            bound: Whether the body's first parameter is the task itself.
            options: The options that were given; the rest have their defaults.

        Raises:
            OptionError: An option is unknown, bad, or contradicts another.
        """
        for option in options:
            if option not in OPTIONS:
                raise OptionError(task, option, options[option], "is no option", _suggest(option, OPTIONS))
        given = {**OPTIONS, **options}
        parameters = Parameters(run, bound)
        rule, merge = _rule(task, given["coalesce_args"])
        policy = cls(
            task=task,
            scope=_scope(task, given["coalesce_scope"]),
            parameters=parameters,
            key_of=_key_of(task, given["coalesce_key"], parameters),
            mode=_word(task, "coalesce", given["coalesce"], Mode),
            max_queued=_count(task, "coalesce_max_queued", given["coalesce_max_queued"]),
            overflow=_word(task, "coalesce_overflow", given["coalesce_overflow"], Overflow),
            rule=rule,
            merge=merge,
            limit=_count(task, "coalesce_limit", given["coalesce_limit"]),
        )
        policy._refuse_contradictions(frozenset(options))
        return policy

    def override(self, options: Mapping[str, Any]) -> Policy:
        """Return this policy as one call overrides it (``coalesce_key`` is the caller's to handle).

        Raises:
            OptionError: An option is unknown, can not be given per call, is bad, or contradicts another.
        """
        changes: dict[str, Any] = {}
        for option, value in options.items():
            if option not in PER_CALL:
                if option in OPTIONS:
                    remedy = "declare it on the task"
                    raise OptionError(self.task, option, value, "can not differ from call to call", remedy)
                raise OptionError(self.task, option, value, "is no option", _suggest(option, PER_CALL))
            if option == "coalesce":
                changes["mode"] = _word(self.task, option, value, Mode)
            elif option == "coalesce_max_queued":
                changes["max_queued"] = _count(self.task, option, value)
            elif option == "coalesce_overflow":
                changes["overflow"] = _word(self.task, option, value, Overflow)
            elif option == "coalesce_args":
                changes["rule"], changes["merge"] = _rule(self.task, value)
        if not changes:
            return self
        policy = replace(self, **changes)
        policy._refuse_contradictions(frozenset(options))
        return policy

    def _refuse_contradictions(self, given: frozenset[str]) -> None:
        if self.mode is Mode.SKIP and self.limit > 1:
            raise OptionError(
                self.task,
                "coalesce_limit",
                self.limit,
                'contradicts coalesce="skip", which answers a call with the one run there is',
                'use coalesce_limit=1, or coalesce="queue"',
            )
        if self.mode is Mode.QUEUE:
            return
        for option in ("coalesce_max_queued", "coalesce_overflow", "coalesce_args"):
            if option in given and "coalesce" in given:
                raise OptionError(
                    self.task,
                    option,
                    {
                        "coalesce_max_queued": self.max_queued,
                        "coalesce_overflow": self.overflow.value,
                        "coalesce_args": self.merge or self.rule.value,
                    }[option],
                    f"has no meaning with coalesce={self.mode.value!r}, which merges nothing",
                    'leave it out, or use coalesce="queue"',
                )

    def key(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Return the key of a call, ``None`` if it is exempt.

        Raises:
            InvalidKey: The key is not a non-empty string.
        """
        if self.key_of is None:
            return self.task
        if isinstance(self.key_of, KeyTemplate):
            key: object = self.key_of.key(self.task, args, kwargs)
        else:
            # Bound first, so that the task's defaults count even where the callable has none.
            args, kwargs = self.parameters.unbind(self.parameters.bind(args, kwargs))
            key = self.key_of(*args, **kwargs)
            if key is None:
                return None
        return self.checked(key)

    def checked(self, key: object) -> str:
        """Return a key that is a non-empty string.

        Raises:
            InvalidKey: It is not.
        """
        if not isinstance(key, str):
            raise InvalidKey(self.task, key, f"a key is a string, not {type(key).__name__}: {key!r}")
        if not key:
            raise InvalidKey(self.task, key, "a key may not be empty; return None for a call that is exempt")
        return key

    @property
    def whole_task(self) -> bool:
        """Whether the whole task is one key."""
        return self.key_of is None


def _suggest(option: str, known: Any) -> str:
    close = difflib.get_close_matches(option, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "known are: " + ", ".join(sorted(known))


def _word(task: str, option: str, value: object, words: type[WordT]) -> WordT:
    try:
        return words(value)
    except ValueError:
        known = ", ".join(repr(word.value) for word in words)
        raise OptionError(task, option, value, "is not known", f"use one of {known}") from None


def _count(task: str, option: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise OptionError(task, option, value, "is not a whole number from 1 to 1,000,000", "give such a number")
    return value


def _scope(task: str, value: object) -> str:
    if value is None:
        return task
    if not isinstance(value, str) or not value:
        raise OptionError(
            task, "coalesce_scope", value, "is not a non-empty string", "leave it out to use the task's name"
        )
    return value


def _rule(task: str, value: object) -> tuple[Rule, Merge | None]:
    if callable(value):
        try:
            inspect.signature(value).bind({}, {})
        except TypeError:
            raise OptionError(
                task, "coalesce_args", value, "does not take two arguments", "write merge(earlier, later)"
            ) from None
        return Rule.MERGE, value
    if value not in (Rule.LATEST.value, Rule.FIRST.value):
        raise OptionError(
            task,
            "coalesce_args",
            value,
            "is not known",
            "use 'latest', 'first' or a function merge(earlier, later)",
        )
    return Rule(value), None


def _key_of(task: str, value: object, parameters: Parameters) -> KeyTemplate | Callable[..., str | None] | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            return KeyTemplate(value, parameters)
        except TemplateError as error:
            raise OptionError(task, "coalesce_key", value, error.problem, error.remedy) from None
    if not callable(value):
        raise OptionError(
            task,
            "coalesce_key",
            value,
            "is neither a template nor a callable",
            'write "org:<org_id>", or a function with the task\'s own parameters',
        )
    _same_signature(task, value, parameters)
    return value


def _same_signature(task: str, function: Callable[..., Any], parameters: Parameters) -> None:
    """Refuse a callable that could not be called with what the task is called with."""
    try:
        own = inspect.signature(function)
    except (TypeError, ValueError):
        return
    takes_any = {p.kind for p in own.parameters.values()}
    if inspect.Parameter.VAR_KEYWORD in takes_any and inspect.Parameter.VAR_POSITIONAL in takes_any:
        return
    if list(own.parameters) != list(parameters.signature.parameters):
        raise OptionError(
            task,
            "coalesce_key",
            function,
            f"takes {own}",
            f"give it the task's own parameters, {parameters.signature}",
        )
