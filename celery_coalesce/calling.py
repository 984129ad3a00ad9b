"""Calls of a coalesced task: their triggers, their messages if they make any, and their results.

One call and a batch of them go the same way: each is made ready, which refuses what is invalid; then all triggers are
accepted, then all messages are published, then all is reported.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from celery.utils import uuid

from . import signals
from .calls import CALLBACKS, HEADER, captured, encode, eta_header, follower_of, is_rpc, moment
from .context import ATTRIBUTE, Run
from .dispatch import publish_all, run_header
from .endings import done_once, take_back, tell_caller
from .engine import engine_of
from .errors import CoalesceError, QueueFull, StoreUnavailable
from .keys import state_id
from .records import Accepted, Trigger
from .states import Disposition, Outage, RunState
from .ticks import tick_of
from .triggering import Asking, accept_all, report
from .views import RunMeta

if TYPE_CHECKING:
    from .policy import Policy
    from .result import CoalescedResult

__all__ = ["Call", "ExemptCall", "make_calls"]

logger = logging.getLogger("celery_coalesce")

#: Options that the record holds for the message: a broker that drops an expired one in silence would cost a minute.
HELD = frozenset({"headers", "countdown", "eta", "expires", "add_to_parent"})

#: Positional and keyword arguments of a call.
Arguments = tuple[Sequence[Any], Mapping[str, Any]]
Plain = Callable[..., Any]


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
            _accept(asked)
        except BaseException:
            # What was accepted is covered by a run, whatever became of those behind it.
            _publish(task, [call for call in asked if call.sends], asked, producer)
            raise
        _publish(task, [call for call in calls if call.sends], asked, producer)
    finally:
        for call in asked:
            call.conclude()
    return [call.result() for call in calls]


def _accept(calls: Sequence[Call]) -> None:
    if not calls:
        return
    engine = engine_of(calls[0].app)
    try:
        for position, reply in accept_all(engine, [call.asking for call in calls]):
            calls[position].take(reply)
    except StoreUnavailable:
        if engine.settings.on_outage is Outage.RAISE:
            raise
        for call in calls:
            call.uncoalesced = call.accepted is None


def _publish(task: Any, sending: Sequence[Call | ExemptCall], asked: Iterable[Call], producer: Any) -> None:
    """Publish in order, all with one producer; take back what could not be."""
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


def _serializer(task: Any, options: Mapping[str, Any]) -> str | None:
    chosen: str | None = options.get("serializer") or task.serializer
    return chosen


def _dumped(task: Any, arguments: Arguments, options: Mapping[str, Any]) -> Arguments:
    """Return arguments without pydantic models, as ``apply_async`` of Celery 5.7 sends them."""
    dump = getattr(task, "_dump_pydantic_arguments", None)
    if dump is None or options.get("serializer") == "pickle":
        return arguments
    dumped: Arguments = dump(*arguments)
    return dumped


class ExemptCall:
    """A call without a key, which is a plain Celery call.

    Args:
        task: The task.
        plain: Celery's own ``apply_async`` of the task, with the call's arguments.
        arguments: Positional and keyword arguments.
        options: The call's options.
        task_id: The id that the caller gave it.

    Raises:
        kombu.exceptions.EncodeError: Arguments or options can not be serialized.
    """

    #: It has a message, whatever there is.
    sends = True

    def __init__(
        self, task: Any, plain: Plain, arguments: Arguments, options: Mapping[str, Any], task_id: str | None
    ) -> None:
        serializer = _serializer(task, options)
        for value in (_dumped(task, arguments, options), captured(task.app, options)):
            # Refused before other calls of its batch are made, and not while it is published.
            encode(value, serializer)
        self._plain = plain
        self._task_id = task_id
        self._options = {**options, "headers": {**(options.get("headers") or {}), HEADER: {"exempt": True}}}
        self._result: CoalescedResult | None = None

    def publish(self, producer: Any) -> None:
        """Publish the call."""
        result: CoalescedResult = self._plain(task_id=self._task_id, producer=producer, **self._options)
        self._result = result.described(Disposition.EXEMPT, None)

    def result(self) -> CoalescedResult:
        """Return the result."""
        if self._result is None:
            raise CoalesceError("a call has a result once it was published")
        return self._result


class Call:
    """A call whose key is known, made ready.

    Args:
        task: The task.
        policy: Its options, as the call overrides them.
        key: The call's key.
        plain: Celery's own ``apply_async`` of the task, with the call's arguments.
        arguments: Positional and keyword arguments.
        options: The call's options.
        task_id: The id that the caller gave it.

    Attributes:
        asking: Its trigger.
        accepted: What became of the trigger, once that is known.
        uncoalesced: Whether it is published without coalescing, because the state server is away.

    Raises:
        InvalidKey: The name of a constraint, or a label, can not be made.
        kombu.exceptions.EncodeError: Arguments or options can not be serialized.
        ValueError: A time can not be read.
    """

    def __init__(  # noqa: PLR0917 - a call is that much
        self,
        task: Any,
        policy: Policy,
        key: str,
        plain: Plain,
        arguments: Arguments,
        options: Mapping[str, Any],
        task_id: str | None = None,
    ) -> None:
        self._task = task
        self._policy = policy
        self._key = key
        self._plain = plain
        self._options = options
        self.app = task.app
        self._engine = engine_of(task.app)
        self._state = state_id(policy.scope, key)
        self._follows = task_id is not None or is_rpc(self.app) or any(options.get(name) for name in CALLBACKS)
        self._call = captured(self.app, options)
        arguments = _dumped(task, arguments, options)
        serializer = _serializer(task, options)
        trigger = self._trigger(arguments, task_id or uuid(), serializer)
        self.asking = Asking(policy, trigger, arguments, serializer)
        self.accepted: Accepted | None = None
        self.uncoalesced = False
        self._undone = False
        self._result: CoalescedResult | None = None

    def _trigger(self, arguments: Arguments, task_id: str, serializer: str | None) -> Trigger:
        args, kwargs = arguments
        call = self._call
        follower = follower_of(str(self._task.name), task_id, call) if self._follows else None
        ignored = self._options.get("ignore_result")
        return Trigger(
            task_id=task_id,
            key=self._key,
            args=encode((args, kwargs), serializer),
            call=encode(call, serializer) if call else b"",
            follower=encode(follower, serializer) if follower else b"",
            store=not (self._task.ignore_result if ignored is None else ignored),
            times=self._times(),
            within=self._within(),
            watch=signals.is_watched(signals.coalesce_trigger, self._engine.producer_bus),
            needs=self._policy.needs(args, kwargs),
            labels=self._policy.labels_of(args, kwargs),
            tick=tick_of(str(self._task.name), args, kwargs),
        )

    def _times(self) -> dict[str, int]:
        """Return the call's due time and expiry."""
        times: dict[str, int] = {}
        countdown, eta = self._options.get("countdown"), self._options.get("eta")
        expires = self._options.get("expires", self._task.expires)
        if countdown:
            times["delay"] = math.ceil(float(countdown) * 1000)
        elif eta:
            times["due"] = moment(self.app, eta)
        if isinstance(expires, int | float):
            times["ttl"] = math.ceil(expires * 1000)
        elif expires is not None:
            times["expires"] = moment(self.app, expires)
        return times

    def _within(self) -> str | None:
        parent = self.app.current_worker_task
        run = parent.request.__dict__.get(ATTRIBUTE) if parent is not None else None
        return run.lease.run if isinstance(run, Run) else None

    def take(self, reply: object) -> None:
        """Take what became of the trigger."""
        if not isinstance(reply, Accepted):
            raise CoalesceError(f"{self._task.name}: the state server gave no answer to a trigger: {reply!r}")
        self.accepted = reply

    @property
    def _answer(self) -> Accepted:
        if self.accepted is None:
            raise CoalesceError("a call has an answer once its trigger was accepted")
        return self.accepted

    @property
    def run(self) -> str:
        """The run that covers it."""
        return self._answer.run

    @property
    def dispatches(self) -> bool:
        """Whether it has the message of a new run to publish."""
        accepted = self.accepted
        new = (Disposition.DISPATCHED, Disposition.QUEUED)
        return accepted is not None and accepted.delay is not None and accepted.disposition in new

    @property
    def sends(self) -> bool:
        """Whether it needs the broker."""
        if self.accepted is None:
            return self.uncoalesced
        return self.dispatches or (is_rpc(self.app) and self.accepted.disposition is not Disposition.REJECTED)

    def publish(self, producer: Any) -> None:
        """Publish the message of its run; without a message, declare the caller's reply queue as publishing would."""
        if self.accepted is None:
            self._publish_uncoalesced(producer)
        elif self.dispatches:
            self._publish_run(self.accepted, producer)
        else:
            with self.app.producer_or_acquire(producer) as one:
                self._task.backend.on_task_call(one, self.asking.trigger.task_id)

    def _publish_run(self, accepted: Accepted, producer: Any) -> None:
        header = run_header(self._state, accepted.run, wait=accepted.delay or 0)
        headers = {**(self._options.get("headers") or {}), HEADER: header}
        if accepted.delay:
            headers["eta"] = eta_header(accepted.delay)
        options = {name: value for name, value in self._options.items() if name not in HELD}
        own = {"expires": None, "headers": headers, "add_to_parent": False}
        self._plain(task_id=accepted.task_id, producer=producer, **options, **own)

    def _publish_uncoalesced(self, producer: Any) -> None:
        """Publish without coalescing; the gate admits the message once the state server is back."""
        logger.warning(
            "The state server is away: %s was published without coalescing",
            self._task.name,
            extra={"action": "published_uncoalesced", "task": self._task.name},
        )
        task_id = self.asking.trigger.task_id
        result: CoalescedResult = self._plain(task_id=task_id, producer=producer, **self._options)
        self._result = result.described(Disposition.DISPATCHED, self._key)

    def take_back(self, covered: Sequence[Call]) -> None:
        """Take its run back, which could not be published, unless others have joined it.

        Args:
            covered: The calls that it covers, of those that were made together.

        Raises:
            CoalesceError: The state server can not be reached, or refused.
        """
        joined = [call for call in covered if call._answer.disposition is Disposition.COALESCED]
        run = RunMeta.unstarted(
            self._policy, self._key, self._answer, triggers=1 + len(joined), labels=self.asking.trigger.labels
        )
        followers = sum(call._follows for call in joined)
        if take_back(self._engine, run, self._engine.producer_bus, followers=followers):
            for call in covered:
                call._undone = True

    def conclude(self) -> None:
        """Do what others have to do about the trigger, report it, and tell a caller whose call needs no run."""
        accepted = self.accepted
        if accepted is None:
            return
        publish_all(self._engine, accepted.sent)
        if self._undone:
            return
        trigger = self.asking.trigger
        report(self._engine.producer_bus, self._policy, trigger, accepted, self.asking.arguments)
        if self._follows and accepted.run_state is RunState.ENDED:
            ending = done_once(self.app, self._policy.task, accepted.task_id)
            tell_caller(self.app, self._policy.task, trigger.task_id, self._call, ending)

    def result(self) -> CoalescedResult:
        """Return the result."""
        if self._result is not None:
            return self._result
        accepted, trigger = self._answer, self.asking.trigger
        covered = accepted.disposition in (Disposition.COALESCED, Disposition.SKIPPED) and not self._follows
        task_id = accepted.task_id if covered else trigger.task_id
        result: CoalescedResult = self._task.AsyncResult(task_id)
        result.ignored = not trigger.store
        result.described(accepted.disposition, self._key, int(accepted.run), accepted.task_id)
        if accepted.disposition is Disposition.REJECTED:
            return result.refused(QueueFull(self._policy.task, self._key, int(accepted.run)))
        parent = self.app.current_worker_task
        if parent is not None and self._options.get("add_to_parent", True):
            parent.add_trail(result)
        return result.done() if covered and accepted.run_state is RunState.ENDED else result
