"""What calls that are made together have in common, looked up once for all of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

from . import signals
from .calls import CALLBACKS, captured, encode, hears_of_calls, is_rpc, moment
from .context import ATTRIBUTE, Run
from .engine import engine_of

if TYPE_CHECKING:
    from .policy import Policy
    from .result import CoalescedResult
    from .states import Disposition

__all__ = ["Arguments", "Plain", "Terms", "dumped", "serializer_of"]

#: Positional and keyword arguments of a call.
Arguments = tuple[Sequence[Any], Mapping[str, Any]]
Plain = Callable[..., Any]


def serializer_of(task: Any, options: Mapping[str, Any]) -> str | None:
    """Return what a call's arguments are serialized with."""
    chosen: str | None = options.get("serializer") or task.serializer
    return chosen


def dumped(task: Any, arguments: Arguments, options: Mapping[str, Any]) -> Arguments:
    """Return arguments without pydantic models, as ``apply_async`` of Celery 5.7 sends them."""
    dump = getattr(task, "_dump_pydantic_arguments", None)
    if dump is None or options.get("serializer") == "pickle":
        return arguments
    made: Arguments = dump(*arguments)
    return made


class Terms:
    """What the calls of one ``apply_async`` or of one batch have in common: nothing here is of one call alone.

    Args:
        task: The task.
        policy: Its options, as the calls override them.
        plain: Celery's own ``apply_async`` of the task.
        options: What else the calls are given.

    Attributes:
        app: The task's app.
        engine: Its engine.
        is_rpc: Whether results go to the caller's own queue.
        parent: The task that makes the calls, if one does.
        within: The run that it is in.
        serializer: What arguments are serialized with.
        call: The options, as they can be stored and given again.
        called: The same, serialized; empty for none.
        follows: Whether each call wants an answer of its own, whatever run covers it.
        stores: Whether the result is wanted.
        times: Due time and expiry, as a trigger has them.
        watched: Whether anybody would notice ``coalesce_trigger``.
        covered: The results of calls that join runs, by the run, what became of the call, and whether that had ended.
        can_be_pushed: Whether a message, if a call makes one at once, may be pushed by a script: to this broker, and
            not later.

    Raises:
        kombu.exceptions.EncodeError: The options can not be serialized.
        ValueError: A time can not be read.
    """

    def __init__(self, task: Any, policy: Policy, plain: Plain, options: Mapping[str, Any]) -> None:
        self.task = task
        self.policy = policy
        self.plain = plain
        self.options = options
        self.app = app = task.app
        self.engine = engine_of(app)
        self.is_rpc = is_rpc(app)
        self.parent = parent = app.current_worker_task
        run = parent.request.__dict__.get(ATTRIBUTE) if parent is not None else None
        self.within: str | None = run.lease.run if isinstance(run, Run) else None
        self.serializer = serializer_of(task, options)
        self.call = captured(app, options, parent)
        self.called = encode(self.call, self.serializer) if self.call else b""
        self.follows = self.is_rpc or any(map(options.get, CALLBACKS))
        ignored = options.get("ignore_result")
        self.stores = not (task.ignore_result if ignored is None else ignored)
        self.times = times = self._times()
        self.watched = signals.is_watched(signals.coalesce_trigger, self.engine.producer_bus)
        waits = policy.delay is not None or "delay" in times or "due" in times
        self.covered: dict[tuple[str, Disposition, bool], CoalescedResult] = {}
        self.can_be_pushed = not (waits or self.is_rpc or "connection" in options)

    @cached_property
    def backend_hears(self) -> bool:
        """Whether the result backend wants to know of each of the calls. Those that join a run need not ask."""
        return hears_of_calls(self.app.backend)

    def _times(self) -> dict[str, int]:
        """Return the calls' due time and expiry."""
        times: dict[str, int] = {}
        countdown, eta = self.options.get("countdown"), self.options.get("eta")
        expires = self.options.get("expires", self.task.expires)
        if countdown:
            times["delay"] = math.ceil(float(countdown) * 1000)
        elif eta:
            times["due"] = moment(self.app, eta)
        if isinstance(expires, int | float):
            times["ttl"] = math.ceil(expires * 1000)
        elif expires is not None:
            times["expires"] = moment(self.app, expires)
        return times
