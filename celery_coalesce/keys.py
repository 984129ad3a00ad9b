"""From a call to its key, and from a key to its names in Redis.

Two calls have one key exactly if their templates give the same text, however the arguments were passed: a template
reads a parameter's value as Python's binding would give it, from a position, a keyword or the default.
"""

from __future__ import annotations

import base64
import hashlib
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

from .errors import InvalidKey

__all__ = ["KeyTemplate", "Names", "Parameters", "TemplateError", "constraint_id", "state_id"]

_TOKEN = re.compile(r"<<|>>|\{\{|\}\}|<([^<>{}]*)>|\{([^<>{}]*)\}|[<>{}]")
_DOUBLED = ("<<", ">>", "{{", "}}")
_FIELD = re.compile(r"[^\W\d]\w*(\.\w+)*\Z")
_MISSING: Any = object()
#: Characters beyond which a key's id is not remembered.
LONG_KEY = 200


class TemplateError(ValueError):
    """A template can not be compiled. ``problem`` and ``remedy`` say why."""

    def __init__(self, problem: str, remedy: str) -> None:
        super().__init__(f"{problem}; {remedy}")
        self.problem = problem
        self.remedy = remedy


class Parameters:
    """A task's parameters, as the caller sees them.

    Args:
        run: The task's ``run``, a function or (as a static attribute) a ``staticmethod``.
        bound: Whether the first parameter is the task itself.
    """

    def __init__(self, run: Callable[..., Any], bound: bool) -> None:
        signature = inspect.signature(run)
        parameters = list(signature.parameters.values())[1 if bound else 0 :]
        self.signature = signature.replace(parameters=parameters)
        self.names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        self.open_ended = any(p.kind is p.VAR_KEYWORD for p in parameters)
        by_position = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        self._positions = {name: position for position, name in enumerate(by_position)}
        self._defaults = {p.name: p.default for p in parameters if p.default is not p.empty}

    def value(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """Return what the call passes for a parameter.

        Raises:
            LookupError: The call passes nothing for it, and it has no default.
        """
        position = self._positions.get(name)
        if position is not None and position < len(args):
            return args[position]
        value = kwargs.get(name, _MISSING)
        if value is _MISSING:
            return self._defaults[name]
        return value

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Return the bound arguments by parameter name, defaults included.

        Raises:
            TypeError: The call does not fit the parameters.
        """
        bound = self.signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return dict(bound.arguments)

    def unbind(self, arguments: Mapping[str, Any]) -> tuple[list[Any], dict[str, Any]]:
        """Return positional and keyword arguments that bind to ``arguments``."""
        bound = inspect.BoundArguments(self.signature, dict(arguments))
        return list(bound.args), dict(bound.kwargs)


class KeyTemplate:
    """``"org:<org_id>"`` or ``"org:{org_id}"``, compiled once.

    Args:
        text: The template. Dots reach into attributes and mappings; ``<<``, ``>>``, ``{{`` and ``}}`` stand for the
            characters themselves.
        parameters: The parameters that its fields may name.

    Raises:
        TemplateError: A stray bracket, a malformed field, or one that is no parameter.
    """

    def __init__(self, text: str, parameters: Parameters) -> None:
        self.text = text
        self._parameters = parameters
        self._parts: list[str | tuple[str, tuple[str, ...]]] = []
        end = 0
        for token in _TOKEN.finditer(text):
            self._literal(text[end : token.start()])
            end = token.end()
            field = token.group(1) if token.group(1) is not None else token.group(2)
            if field is not None:
                self._field(field)
            elif token.group() in _DOUBLED:
                self._literal(token.group()[0])
            else:
                raise TemplateError(
                    f"has a stray {token.group()!r}", f"write {token.group() * 2!r} for the character itself"
                )
        self._literal(text[end:])
        if not self._parts:
            raise TemplateError("is empty", "leave coalesce_key out to make the whole task one key")

    def _literal(self, text: str) -> None:
        if text:
            self._parts.append(text)

    def _field(self, field: str) -> None:
        if not _FIELD.match(field):
            raise TemplateError(f"has the malformed field {field!r}", "name a parameter, with dots to reach into it")
        name, *path = field.split(".")
        if name not in self._parameters.names and not self._parameters.open_ended:
            known = ", ".join(self._parameters.names) or "none"
            raise TemplateError(f"has the unknown field {name!r}", f"the task's parameters are: {known}")
        self._parts.append((name, tuple(path)))

    def key(self, task: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
        """Return the key of a call.

        Raises:
            InvalidKey: A field has no value, or ``None``.
        """
        texts: list[str] = []
        for part in self._parts:
            value = part if isinstance(part, str) else self._value(task, part, args, kwargs)
            if value is None:
                raise InvalidKey(
                    task,
                    None,
                    f"{_field_name(part)!r} of the key {self.text!r} is None; pass coalesce_key=None for a call that "
                    "shall not coalesce, or use a callable that returns None",
                )
            texts.append(str(value))
        return "".join(texts)

    def text_or_none(self, task: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Return the text of a call, ``None`` if a field is ``None``.

        Raises:
            InvalidKey: A field has no value.
        """
        values = [part if isinstance(part, str) else self._value(task, part, args, kwargs) for part in self._parts]
        return None if any(value is None for value in values) else "".join(map(str, values))

    def _value(
        self, task: str, part: tuple[str, tuple[str, ...]], args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        name, path = part
        try:
            value = self._parameters.value(name, args, kwargs)
            for step in path:
                value = value[step] if isinstance(value, Mapping) else getattr(value, step)
        except (LookupError, AttributeError, TypeError) as error:
            text = f"the call has no value for {_field_name(part)!r} of the key {self.text!r}"
            raise InvalidKey(task, None, text) from error
        return value


def _field_name(part: str | tuple[str, tuple[str, ...]]) -> str:
    return part if isinstance(part, str) else ".".join((part[0], *part[1]))


def state_id(scope: str, key: str) -> str:
    """Return the id under which a key's record is found, the same for ever.

    A digest, so that keys of any length and any Unicode make the same short name; the scope's length is part of it,
    so that no key of one scope is another's.
    """
    text = f"{len(scope)}:{scope}{key}"
    return _digest(text) if len(text) > LONG_KEY else _known_digest(text)


def _digest(text: str) -> str:
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return base64.b32encode(digest).decode("ascii").rstrip("=").lower()


#: A call and its message, or a burst of calls, ask for the same again and again.
_known_digest = lru_cache(maxsize=1024)(_digest)


def constraint_id(name: str) -> str:
    """Return the id under which a constraint is found, the same for ever."""
    return state_id("", name)


@dataclass(frozen=True)
class Names:
    """The names of everything in Redis.

    All share the hash tag ``{namespace}``, so that the keys of one transition live in one slot of a Cluster.
    """

    prefix: str
    namespace: str

    @cached_property
    def _start(self) -> str:
        return f"{self.prefix}{{{self.namespace}}}:"

    def _name(self, *parts: str) -> str:
        return self._start + ":".join(parts)

    def record(self, state: str) -> tuple[str, ...]:
        """Return the keys that every transition of a record takes."""
        start = self._start
        own = (f"{start}rec:{state}", f"{start}wait:{state}", self.meta, self.timers, f"{start}kept:{state}")
        return (*own, *self.constraints)

    @cached_property
    def constraints(self) -> tuple[str, str, str, str]:
        """Constraints: their limits, who holds their slots, who waits in their lines, and when they have rested."""
        return (self._name("limits"), self._name("slots"), self._name("lines"), self._name("resting"))

    @cached_property
    def history(self) -> str:
        """What is remembered of each task."""
        return self._name("history")

    def held(self, process: str) -> str:
        """Return the index of the leases that hang from a process."""
        return self._name("held", process)

    @cached_property
    def meta(self) -> str:
        """The namespace's numbers."""
        return self._name("meta")

    @cached_property
    def timers(self) -> str:
        """Runs by the time at which somebody must look at them."""
        return self._name("timers")

    @cached_property
    def presence(self) -> str:
        """Worker processes by the time at which their presence runs out."""
        return self._name("presence")

    @cached_property
    def drains(self) -> str:
        """Drains that were recorded and not yet announced."""
        return self._name("drains")

    @cached_property
    def seen(self) -> str:
        """Messages without a run that were admitted."""
        return self._name("seen")

    def turn(self, run: str) -> str:
        """Return the list on which plain code hears that its turn has come."""
        return self._name("turn", run)

    def answer(self, call: str) -> str:
        """Return the list on which a caller of ``share`` gets the value."""
        return self._name("answer", call)
