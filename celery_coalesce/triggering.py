"""From a call, or a message without a run, to what became of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from . import signals
from .calls import decode, encode
from .errors import CoalesceError, StoreError
from .keys import state_id
from .records import Accepted, Known, MergeWanted, TriggerMeta
from .states import Disposition, Rule

if TYPE_CHECKING:
    from celery import Celery

    from .engine import Engine
    from .policy import Policy
    from .records import Trigger
    from .signals import EventBus

__all__ = ["accept", "report"]

#: Another trigger came between reading and merging this often: something is wrong.
MOST_MERGES = 10_000


def accept(
    engine: Engine,
    policy: Policy,
    trigger: Trigger,
    arguments: tuple[Sequence[Any], Mapping[str, Any]],
    serializer: str | None,
) -> Accepted | Known | None:
    """Have a trigger accepted, its arguments merged by the task's function if they are to be.

    Args:
        engine: The app's engine.
        policy: The task's options, as the call overrides them.
        trigger: The trigger.
        arguments: Its positional and keyword arguments.
        serializer: What merged arguments are serialized with.

    Returns:
        What became of it; for a message: the run that it was admitted as before, or ``None`` if that has ended.

    Raises:
        StoreUnavailable: The state server can not be reached.
        Exception: Whatever the merge function raises; nothing was changed.
    """
    reply = engine.transitions.trigger(policy, trigger)
    for _ in range(MOST_MERGES):
        if not isinstance(reply, MergeWanted):
            return reply
        merged = encode(_merged(engine.app, policy, reply.args, arguments), serializer)
        reply = engine.transitions.trigger(policy, replace(trigger, args=merged), reply)
    raise StoreError(f"{policy.task}: key {trigger.key!r} changes faster than arguments can be merged")


def _merged(
    app: Celery, policy: Policy, earlier: bytes, later: tuple[Sequence[Any], Mapping[str, Any]]
) -> tuple[list[Any], dict[str, Any]]:
    if policy.merge is None:
        raise CoalesceError(f"{policy.task} has no merge function")
    bind = policy.parameters.bind
    merged = policy.merge(bind(*decode(app, earlier)), bind(*later))
    if not isinstance(merged, Mapping):
        raise TypeError(
            f"{policy.task}: coalesce_args={policy.merge!r} returned {merged!r}; return a mapping of arguments"
        )
    args, kwargs = policy.parameters.unbind(merged)
    # Refuses what the task could not be called with, before it is stored.
    bind(args, kwargs)
    return args, kwargs


def report(
    bus: EventBus,
    policy: Policy,
    trigger: Trigger,
    accepted: Accepted,
    arguments: tuple[Sequence[Any], Mapping[str, Any]],
) -> None:
    """Send ``coalesce_trigger``."""
    if not signals.is_watched(signals.coalesce_trigger, bus):
        return
    unused: Any = None
    if accepted.disposition in (Disposition.SKIPPED, Disposition.REJECTED) or (
        accepted.disposition is Disposition.COALESCED and policy.rule is Rule.FIRST
    ):
        unused = arguments
    elif accepted.replaced and policy.rule is Rule.LATEST:
        unused = tuple(decode(bus.app, accepted.replaced))
    meta = TriggerMeta(
        key=trigger.key,
        scope=policy.scope,
        name=policy.task,
        task_id=trigger.task_id,
        state_id=state_id(policy.scope, trigger.key),
        disposition=accepted.disposition,
        run_id=int(accepted.run),
        run_task_id=accepted.task_id,
        run_state=accepted.run_state,
        labels=trigger.labels,
    )
    signals.emit(
        signals.coalesce_trigger,
        bus.app.tasks.get(policy.task),
        bus,
        meta,
        unused=unused,
    )
