"""Making calls: one and many go the same way.

Each is made ready, which refuses what is invalid; then all triggers are accepted, then all messages are published that
scripts have not pushed, then all is reported.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from .calling import Call, ExemptCall
from .errors import CoalesceError, StoreUnavailable
from .states import Outage
from .store import MOST_AT_ONCE
from .triggering import accept, accept_all

if TYPE_CHECKING:
    from .broker import Broker
    from .result import CoalescedResult

__all__ = ["make_calls"]

logger = logging.getLogger("celery_coalesce")

#: So many calls of a batch tell whether its keys are busy.
SAMPLE = 25


def make_calls(task: Any, calls: Sequence[Call | ExemptCall], producer: Any = None) -> list[CoalescedResult]:
    """Make calls of a task.

    Args:
        task: The task.
        calls: The calls, made ready.
        producer: A kombu producer to publish with.

    Returns:
        Their results, in their order.

    Raises:
        StoreUnavailable: The state server can not be reached, and calls are not published without it.
        kombu.exceptions.OperationalError: The broker can not be reached. What was not published is taken back.
        Exception: Whatever a merge function raises.
    """
    asked = [call for call in calls if isinstance(call, Call)]
    try:
        try:
            _accept(asked, producer)
        except BaseException:
            # What was accepted is covered by a run, whatever became of those behind it.
            _publish(task, [call for call in asked if call.sends], asked, producer)
            raise
        _publish(task, [call for call in calls if call.sends], asked, producer)
    finally:
        for call in asked:
            call.conclude()
    return [call.result() for call in calls]


def _accept(calls: Sequence[Call], producer: Any) -> None:
    if not calls:
        return
    terms = calls[0].terms
    broker = terms.engine.broker
    try:
        if broker is not None and producer is None and terms.can_be_pushed and broker.may_push():
            _accept_pushing(broker, calls)
        else:
            _ask(calls)
    except StoreUnavailable:
        if terms.engine.settings.on_outage is Outage.RAISE:
            raise
        for call in calls:
            call.uncoalesced = call.accepted is None


def _accept_pushing(broker: Broker, calls: Sequence[Call]) -> None:
    """Have calls accepted with messages that are pushed in the same go: of each key, if it is likely to be idle, one.

    A message for a key that is busy is made in vain, and costs more than a round trip. So of a batch a few calls are
    asked first, and then a part at a time, each as the one before it was answered: without messages if most of its keys
    were busy. Where that was no sign, messages are published by themselves, or made in vain: work, and nothing else.
    """
    seen: set[str] = set()
    busy = False
    begin, end = 0, SAMPLE
    while begin < len(calls):
        part = calls[begin:end]
        first = {call.state: call for call in reversed(part) if call.state not in seen}
        if not busy:
            _make_messages(broker, [call for call in first.values() if not broker.was_busy(call.state)])
        _ask(part)
        if first and end < len(calls):
            busy = 2 * sum(call.met_a_busy_key for call in first.values()) > len(first)
            seen |= first.keys()
        begin, end = end, end + MOST_AT_ONCE


def _ask(calls: Sequence[Call]) -> None:
    if len(calls) == 1:
        [call] = calls
        call.take(accept(call.terms.engine, call.ask()))
        return
    for position, reply in accept_all(calls[0].terms.engine, [call.ask() for call in calls]):
        calls[position].take(reply)


def _make_messages(broker: Broker, calls: Sequence[Call]) -> None:
    """Make the messages that are pushed as their calls are accepted."""
    if not calls:
        return
    try:
        with calls[0].terms.app.producer_or_acquire() as one:
            for call in calls:
                call.make_message(broker, one)
    except Exception as error:
        # The broker is this very server: whoever asks it to accept the call is told what is wrong.
        logger.debug("No message could be made: %r", error, extra={"action": "not_pushed"})


def _publish(task: Any, sending: Sequence[Call | ExemptCall], asked: Iterable[Call], producer: Any) -> None:
    """Publish in order, all with one producer; take back what could not be."""
    if not sending:
        return
    done = 0
    try:
        shared = task.app.producer_or_acquire(producer) if len(sending) > 1 else nullcontext(producer)
        with shared as one:
            for call in sending:
                call.publish(one)
                done += 1
    except BaseException:
        _take_back([call for call in sending[done:] if isinstance(call, Call) and call.dispatches], asked)
        raise


def _take_back(unpublished: Sequence[Call], asked: Iterable[Call]) -> None:
    covered: dict[str, list[Call]] = {}
    for call in asked:
        if call.accepted is not None:
            covered.setdefault(call.accepted.run, []).append(call)
    for position, call in enumerate(unpublished):
        try:
            call.take_back(covered[call.run])
        except CoalesceError:
            for left in unpublished[position:]:
                logger.warning(
                    "Run %s could be neither published nor taken back; it will be dispatched again",
                    left.run,
                    extra={"action": "rollback_failed", "run_id": left.run},
                )
            return
