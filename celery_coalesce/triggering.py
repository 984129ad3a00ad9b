"""From calls, or a message without a run, to what became of them."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from . import signals
from .calls import decode, encode
from .errors import CoalesceError, StoreError
from .keys import state_id
from .records import Accepted, Known, MergeWanted
from .states import Disposition, Rule
from .views import TriggerMeta

if TYPE_CHECKING:
    from celery import Celery

    from .engine import Engine
    from .policy import Policy
    from .records import Trigger
    from .signals import EventBus

__all__ = ["Asking", "accept", "accept_all", "report"]

#: Another trigger came between reading and merging this often: something is wrong.
MOST_MERGES = 10_000


class Asking(NamedTuple):
    """A trigger, and what its arguments are merged with."""

    #: The task's options, as the call overrides them.
    policy: Policy
    trigger: Trigger
    #: Positional and keyword arguments.
    arguments: tuple[Sequence[Any], Mapping[str, Any]]
    #: What merged arguments are serialized with.
    serializer: str | None


def accept(engine: Engine, asked: Asking) -> Accepted | Known | None:
    """Have a trigger accepted, its arguments merged by the task's function if they are to be.

    Args:
        engine: The app's engine.
        asked: The trigger.

    Returns:
        What became of it; for a message: the run that it was admitted as before, or ``None`` if that has ended.

    Raises:
        StoreUnavailable: The state server can not be reached.
        Exception: Whatever the merge function raises; nothing was changed.
    """
    reply = engine.transitions.trigger(asked.policy, asked.trigger)
    if not isinstance(reply, MergeWanted):
        return reply
    [(_, merged)] = _merged_all(engine, [asked], {0: reply})
    return merged


def accept_all(engine: Engine, asked: Sequence[Asking]) -> Iterator[tuple[int, Accepted | Known | None]]:
    """Have triggers accepted, those of one key in their order.

    Takes one round, and another where arguments are to be merged by a function: the merges of a key are worked out
    here, each upon the one before, and sent together. Where somebody else came between there are further rounds.

    Args:
        engine: The app's engine.
        asked: The triggers.

    Yields:
        The position of each, and what became of it, as :func:`accept` returns it; in any order.

    Raises:
        StoreUnavailable: The state server can not be reached.
        Exception: Whatever a merge function raises. What was yielded was accepted.
    """
    replies = engine.transitions.triggers([(each.policy, each.trigger, None) for each in asked])
    wanted = yield from _answered(replies)
    yield from _merged_all(engine, asked, wanted)


def _answered(
    replies: Iterable[tuple[int, Accepted | MergeWanted | Known | None]],
) -> Generator[tuple[int, Accepted | Known | None], None, dict[int, MergeWanted]]:
    """Yield the answers among the replies to triggers; return what is to be merged, by the triggers' positions."""
    wanted: dict[int, MergeWanted] = {}
    for position, reply in replies:
        if isinstance(reply, MergeWanted):
            wanted[position] = reply
        else:
            yield position, reply
    return wanted


def _merged_all(
    engine: Engine, asked: Sequence[Asking], wanted: Mapping[int, MergeWanted]
) -> Iterator[tuple[int, Accepted | Known | None]]:
    """Have the triggers accepted whose arguments are to be merged, as :func:`accept_all` does."""
    for _ in range(MOST_MERGES):
        if not wanted:
            return
        by_key: dict[str, list[int]] = {}
        for position in wanted:
            by_key.setdefault(asked[position].trigger.key, []).append(position)
        left: dict[int, tuple[Policy, Trigger, MergeWanted | None]] = {}
        for same in by_key.values():
            left |= _chained(engine.app, wanted[same[0]], {position: asked[position] for position in same})
        positions = list(left)
        replies = engine.transitions.triggers(list(left.values()))
        wanted = yield from _answered((positions[index], reply) for index, reply in replies)
    keys = ", ".join(repr(asked[position].trigger.key) for position in wanted)
    raise StoreError(f"{asked[0].policy.task}: key {keys} changes faster than arguments can be merged")


def _chained(
    app: Celery, base: MergeWanted, asked: Mapping[int, Asking]
) -> dict[int, tuple[Policy, Trigger, MergeWanted | None]]:
    """Return the triggers of one key, each with its arguments merged upon those of the one before."""
    if not base.run:
        return {position: (each.policy, each.trigger, None) for position, each in asked.items()}
    chain: dict[int, tuple[Policy, Trigger, MergeWanted | None]] = {}
    for position, each in asked.items():
        arguments = _merged(app, each.policy, base.args, each.arguments)
        merged = encode(arguments, each.serializer)
        # The run needs what the arguments need that it will see.
        needs = each.policy.needs(*arguments)
        chain[position] = (each.policy, each.trigger._replace(args=merged, needs=needs, push=None), base)
        base = MergeWanted(base.run, base.version + 1, merged)
    return chain


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
