"""The options of a task: their names and defaults, what each takes, and which of them contradict each other."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any, TypeVar

from .errors import OptionError
from .keys import KeyTemplate, Parameters, TemplateError
from .states import Mode, OnError, OnRetry, Overflow, Rule

__all__ = [
    "OPTIONS",
    "PER_CALL",
    "Constraint",
    "Merge",
    "Need",
]

#: Every option of a task, with its default.
OPTIONS: dict[str, Any] = {
    "coalesce_key": None,
    "coalesce_scope": None,
    "coalesce": Mode.QUEUE.value,
    "coalesce_max_queued": 1,
    "coalesce_overflow": Overflow.MERGE.value,
    "coalesce_args": Rule.LATEST.value,
    "coalesce_limit": 1,
    "coalesce_delay": None,
    "coalesce_max_delay": None,
    "coalesce_cooldown": None,
    "coalesce_constraints": None,
    "coalesce_once": None,
    "coalesce_should_run": None,
    "coalesce_on_error": OnError.CONTINUE.value,
    "coalesce_on_retry": OnRetry.HOLD.value,
    "coalesce_grace": 10,
    "coalesce_labels": None,
    "coalesce_steps": None,
    "coalesce_setup": None,
}

#: Those that one call may override. All runs of a key, or all attempts of a run, must agree on the others.
PER_CALL = frozenset(
    {"coalesce", "coalesce_key", "coalesce_max_queued", "coalesce_overflow", "coalesce_args", "coalesce_delay",
     "coalesce_max_delay"}
)  # fmt: skip

#: More runs of one key than this are a mistake.
MOST = 1_000_000
#: Seconds: longer than a year is a mistake.
LONGEST = 366 * 86_400

Merge = Callable[[dict[str, Any], dict[str, Any]], Mapping[str, Any]]
WordT = TypeVar("WordT", bound=Enum)


@dataclass(frozen=True)
class Constraint:
    """Slots that runs of any key and any task share by name.

    ::

        @app.task(base=CoalescedTask, coalesce_constraints=Constraint("provider:<provider>", limit=3, cooldown=11))
        def fetch(provider, page): ...

    Args:
        template: The name, over the task's parameters like a key's template; a field that is ``None`` makes the call
            exempt from this constraint. Or a callable with the task's own signature that returns the name or ``None``.
        limit: How many runs with that name go on at once.
        cooldown: Least seconds from the end of a run with that name to the start of the next.

    .. versionadded:: 0.1
    """

    template: str | Callable[..., str | None]
    limit: int = 1
    cooldown: float | None = None


@dataclass(frozen=True)
class Need:
    """A constraint as one call needs it."""

    name: str
    limit: int
    #: Seconds.
    cooldown: float


def suggest(option: str, known: Any) -> str:
    """Return the remedy for a name that is not known."""
    close = difflib.get_close_matches(option, list(known), n=1)
    return f"did you mean {close[0]!r}?" if close else "known are: " + ", ".join(sorted(known))


def word(task: str, option: str, value: object, words: type[WordT]) -> WordT:
    """Return a value as one of an option's words."""
    try:
        return words(value)
    except ValueError:
        known = ", ".join(repr(each.value) for each in words)
        raise OptionError(task, option, value, "is not known", f"use one of {known}") from None


def count(task: str, option: str, value: object) -> int:
    """Return a value that counts runs."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MOST:
        raise OptionError(task, option, value, "is not a whole number from 1 to 1,000,000", "give such a number")
    return value


def seconds(task: str, option: str, value: object, *, zero: bool = False) -> float | None:
    """Return a value that is a number of seconds, or ``None``."""
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 0 <= value <= LONGEST or not (value or zero):  # type: ignore[operator]
        least = "from 0" if zero else "above 0 and"
        problem = f"is not a number of seconds {least} up to a year"
        raise OptionError(task, option, value, problem, "give such a number, or None")
    return float(value)  # type: ignore[arg-type]


def scope(task: str, value: object) -> str:
    """Return what keys are unique in."""
    if value is None:
        return task
    if not isinstance(value, str) or not value:
        raise OptionError(
            task, "coalesce_scope", value, "is not a non-empty string", "leave it out to use the task's name"
        )
    return value


def rule(task: str, value: object) -> tuple[Rule, Merge | None]:
    """Return whose arguments a covering run gets, and the function that says so."""
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


def template(task: str, option: str, value: object, parameters: Parameters) -> KeyTemplate | Callable[..., str | None]:
    """Return what makes a text of a call: a template, or a callable with the task's own signature."""
    if isinstance(value, str):
        try:
            return KeyTemplate(value, parameters)
        except TemplateError as error:
            raise OptionError(task, option, value, error.problem, error.remedy) from None
    if not callable(value):
        raise OptionError(
            task,
            option,
            value,
            "is neither a template nor a callable",
            'write "org:<org_id>", or a function with the task\'s own parameters',
        )
    same_signature(task, option, value, parameters)
    return value


def same_signature(task: str, option: str, function: Callable[..., Any], parameters: Parameters) -> None:
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
            option,
            function,
            f"takes {own}",
            f"give it the task's own parameters, {parameters.signature}",
        )


def sync_callable(task: str, option: str, value: object) -> Callable[..., Any] | None:
    """Return a function that is called in the worker, or ``None``."""
    if value is None:
        return None
    if not callable(value) or inspect.iscoroutinefunction(value):
        raise OptionError(task, option, value, "is no plain function", "give a function that is not async")
    return value


def constraints(
    task: str, value: object, parameters: Parameters
) -> tuple[tuple[KeyTemplate | Callable[..., str | None], int, float], ...]:
    """Return constraints as (what makes the name, limit, cooldown in seconds)."""
    option = "coalesce_constraints"
    each = (value,) if isinstance(value, Constraint) else () if value is None else value
    if not isinstance(each, list | tuple) or not all(isinstance(one, Constraint) for one in each):
        raise OptionError(
            task, option, value, "is no Constraint, or list of them", 'write Constraint("provider:<provider>", limit=3)'
        )
    return tuple(
        (
            template(task, option, one.template, parameters),
            count(task, f"{option}: limit", one.limit),
            seconds(task, f"{option}: cooldown", one.cooldown, zero=True) or 0.0,
        )
        for one in each
    )


def labels(task: str, value: object, parameters: Parameters) -> dict[str, KeyTemplate]:
    """Return labels as templates by name."""
    option = "coalesce_labels"
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(name, str) and name for name in value):
        raise OptionError(task, option, value, "is no mapping of names to templates", 'write {"tenant": "<org_id>"}')
    found = {}
    for name, text in value.items():
        made = template(task, option, text, parameters)
        if not isinstance(made, KeyTemplate):
            raise OptionError(task, option, text, f"is no template for {name!r}", 'write {"tenant": "<org_id>"}')
        found[name] = made
    return found


def steps(task: str, value: object) -> dict[str, float]:
    """Return the weights of steps by name, in their order."""
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(
        isinstance(name, str)
        and name
        and isinstance(weight, int | float)
        and not isinstance(weight, bool)
        and 0 < weight <= MOST
        for name, weight in value.items()
    ):
        raise OptionError(
            task,
            "coalesce_steps",
            value,
            "is no mapping of names to weights above 0",
            'write {"build": 30, "test": 20, "deploy": 50}',
        )
    return {name: float(weight) for name, weight in value.items()}


def once(task: str, value: object) -> float | bool | None:
    """Return for how many seconds a success counts, ``True`` for ever, ``None`` not at all."""
    if value is None or value is False:
        return None
    return True if value is True else seconds(task, "coalesce_once", value)
