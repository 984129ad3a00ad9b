"""What a task declared.

A :class:`Policy` that exists makes sense: whatever does not is refused when the task is bound to its app, with an
:exc:`~celery_coalesce.errors.OptionError` that names the task, the option, the value and the remedy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from . import options as read
from .contradictions import CONTRADICTIONS, NEEDS, declared_on
from .errors import InvalidKey, OptionError
from .keys import KeyTemplate, Parameters
from .options import OPTIONS, PER_CALL, Merge, Need
from .states import Mode, OnError, OnRetry, Overflow, Rule

__all__ = ["Policy", "in_ms"]

Text = KeyTemplate | Callable[..., str | None]


def in_ms(seconds: float) -> int:
    """Return seconds as whole milliseconds, no fewer."""
    return math.ceil(seconds * 1000)


@dataclass(frozen=True)
class Policy:
    """A task's options. Times are seconds.

    Build one with :meth:`declare`; the fields are then consistent with each other.
    """

    task: str
    scope: str
    parameters: Parameters
    #: ``None``: the whole task is one key.
    key_of: Text | None
    mode: Mode
    max_queued: int
    overflow: Overflow
    rule: Rule
    merge: Merge | None
    limit: int
    delay: float | None = None
    max_delay: float | None = None
    cooldown: float = 0.0
    #: What makes a constraint's name, its limit, its cooldown.
    constraints: tuple[tuple[Text, int, float], ...] = ()
    #: ``True``: for ever.
    once: float | bool | None = None
    should_run: Callable[..., Any] | None = None
    on_error: OnError = OnError.CONTINUE
    on_retry: OnRetry = OnRetry.HOLD
    #: ``None``: a replaced run is asked to stop, and never made to.
    grace: float | None = None
    labels: Mapping[str, KeyTemplate] = field(default_factory=dict)
    steps: Mapping[str, float] = field(default_factory=dict)
    setup: Callable[[], Any] | None = None

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
                raise OptionError(task, option, options[option], "is no option", read.suggest(option, OPTIONS))
        given = {**OPTIONS, **options}
        parameters = Parameters(run, bound)
        rule, merge = read.rule(task, given["coalesce_args"])
        key = given["coalesce_key"]
        should_run = read.sync_callable(task, "coalesce_should_run", given["coalesce_should_run"])
        if should_run is not None:
            read.same_signature(task, "coalesce_should_run", should_run, parameters)
        policy = cls(
            task=task,
            scope=read.scope(task, given["coalesce_scope"]),
            parameters=parameters,
            key_of=None if key is None else read.template(task, "coalesce_key", key, parameters),
            mode=read.word(task, "coalesce", given["coalesce"], Mode),
            max_queued=read.count(task, "coalesce_max_queued", given["coalesce_max_queued"]),
            overflow=read.word(task, "coalesce_overflow", given["coalesce_overflow"], Overflow),
            rule=rule,
            merge=merge,
            limit=read.count(task, "coalesce_limit", given["coalesce_limit"]),
            delay=read.seconds(task, "coalesce_delay", given["coalesce_delay"]),
            max_delay=read.seconds(task, "coalesce_max_delay", given["coalesce_max_delay"]),
            cooldown=read.seconds(task, "coalesce_cooldown", given["coalesce_cooldown"], zero=True) or 0.0,
            constraints=read.constraints(task, given["coalesce_constraints"], parameters),
            once=read.once(task, given["coalesce_once"]),
            should_run=should_run,
            on_error=read.word(task, "coalesce_on_error", given["coalesce_on_error"], OnError),
            on_retry=read.word(task, "coalesce_on_retry", given["coalesce_on_retry"], OnRetry),
            grace=read.seconds(task, "coalesce_grace", given["coalesce_grace"], zero=True),
            labels=read.labels(task, given["coalesce_labels"], parameters),
            steps=read.steps(task, given["coalesce_steps"]),
            setup=read.sync_callable(task, "coalesce_setup", given["coalesce_setup"]),
        )
        policy._refuse_contradictions(options, given)
        return policy

    def override(self, options: Mapping[str, Any]) -> Policy:
        """Return this policy as one call overrides it (``coalesce_key`` is the caller's to handle).

        What the task declares and the call's own mode has no use for is left aside.

        Raises:
            OptionError: An option is unknown, can not be given per call, is bad, or contradicts another.
        """
        changes: dict[str, Any] = {}
        for option, value in options.items():
            if option not in PER_CALL:
                if option in OPTIONS:
                    remedy = "declare it on the task"
                    raise OptionError(self.task, option, value, "can not differ from call to call", remedy)
                raise OptionError(self.task, option, value, "is no option", read.suggest(option, PER_CALL))
            if option == "coalesce":
                changes["mode"] = read.word(self.task, option, value, Mode)
            elif option == "coalesce_max_queued":
                changes["max_queued"] = read.count(self.task, option, value)
            elif option == "coalesce_overflow":
                changes["overflow"] = read.word(self.task, option, value, Overflow)
            elif option == "coalesce_args":
                changes["rule"], changes["merge"] = read.rule(self.task, value)
            elif option in ("coalesce_delay", "coalesce_max_delay"):
                changes[option.removeprefix("coalesce_")] = read.seconds(self.task, option, value)
        if not changes:
            return self
        policy = replace(self, **changes)
        # What no call can do without: all runs of a key must agree on it.
        fixed: dict[str, Any] = {"coalesce_limit": self.limit, "coalesce_once": self.once}
        if "coalesce" not in options:
            # Nothing gives way: the call's other options have to make sense beside what the task declares.
            fixed |= {
                "coalesce": self.mode.value,
                "coalesce_overflow": self.overflow.value,
                "coalesce_on_retry": self.on_retry.value,
            }
        if policy.merges:
            fixed |= {"coalesce_delay": policy.delay, "coalesce_overflow": policy.overflow.value}
        policy._refuse_contradictions(options, {**fixed, **options})
        return policy

    def _refuse_contradictions(self, given: Mapping[str, Any], standing: Mapping[str, Any]) -> None:
        """Refuse what makes no sense together.

        Args:
            given: The options that were given.
            standing: Those, and what stands beside them.
        """
        for pair in CONTRADICTIONS:
            if not (declared_on(pair.one, standing) and declared_on(pair.other, standing)):
                continue
            option, other = pair.one.partition("=")[0], pair.other.partition("=")[0]
            if option in given or other in given:
                raise OptionError(self.task, option, standing[option], pair.reason, pair.remedy)
        for pair in NEEDS:
            if declared_on(pair.one, given) and not declared_on(pair.other, standing):
                option = pair.one.partition("=")[0]
                raise OptionError(self.task, option, given[option], pair.reason, pair.remedy)
        if self.max_delay is not None and self.delay is not None and self.max_delay < self.delay:
            raise OptionError(
                self.task,
                "coalesce_max_delay",
                self.max_delay,
                f"is shorter than coalesce_delay={self.delay}, which it bounds",
                "make it longer",
            )

    @property
    def merges(self) -> bool:
        """Whether a trigger joins a run that has not started."""
        return self.mode in (Mode.QUEUE, Mode.REPLACE)

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
            key = self._called(self.key_of, args, kwargs)
            if key is None:
                return None
        return self.checked(key)

    def key_of_call(self, args: Sequence[Any], kwargs: Mapping[str, Any], overrides: Mapping[str, Any]) -> str | None:
        """Return the key of a call that may bring its own as ``coalesce_key``, ``None`` if it is exempt.

        Raises:
            InvalidKey: The key is not a non-empty string.
        """
        if "coalesce_key" not in overrides:
            return self.key(args, kwargs)
        given = overrides["coalesce_key"]
        return None if given is None else self.checked(given)

    def _called(self, function: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        # Bound first, so that the task's defaults count even where the callable has none.
        args, kwargs = self.parameters.unbind(self.parameters.bind(args, kwargs))
        return function(*args, **kwargs)

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

    def needs(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[Need, ...]:
        """Return the constraints of a call, each name once with what is strictest.

        Raises:
            InvalidKey: A name is not a non-empty string.
        """
        found: dict[str, Need] = {}
        for made, limit, cooldown in self.constraints:
            if isinstance(made, KeyTemplate):
                name: object = made.text_or_none(self.task, args, kwargs)
            else:
                name = self._called(made, args, kwargs)
            if name is None:
                continue
            if not isinstance(name, str) or not name:
                raise InvalidKey(self.task, name, f"a constraint's name is a non-empty string, not {name!r}")
            other = found.get(name, Need(name, limit, cooldown))
            found[name] = Need(name, min(limit, other.limit), max(cooldown, other.cooldown))
        return tuple(found.values())

    def labels_of(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, str]:
        """Return the labels of a call; one with a field that is ``None`` is left out.

        Raises:
            InvalidKey: A label's field has no value.
        """
        made = {name: text.text_or_none(self.task, args, kwargs) for name, text in self.labels.items()}
        return {name: text for name, text in made.items() if text is not None}

    @cached_property
    def asked(self) -> str:
        """What every trigger asks for, as the inside of a JSON object; what is usual (lib/accept.lua) is left out."""
        fields = (
            ("mode", self.mode.value, Mode.QUEUE.value),
            ("limit", self.limit, 1),
            ("max_queued", self.max_queued, 1),
            ("overflow", self.overflow.value, Overflow.MERGE.value),
            ("rule", self.rule.value, Rule.LATEST.value),
            ("cooldown", in_ms(self.cooldown), 0),
            ("once", bool(self.once), False),
        )
        given: dict[str, Any] = {name: value for name, value, usual in fields if value != usual}
        given |= {"task": self.task, "scope": self.scope}
        if self.merges and self.delay is not None:
            given["quiet"] = in_ms(self.delay)
            if self.max_delay is not None:
                given["longest"] = in_ms(self.max_delay)
        if self.mode is Mode.REPLACE and self.grace is not None:
            given["grace"] = in_ms(self.grace)
        return json.dumps(given)[1:-1] + ", "

    @property
    def whole_task(self) -> bool:
        """Whether the whole task is one key."""
        return self.key_of is None
