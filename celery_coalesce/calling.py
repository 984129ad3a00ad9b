"""A call of a coalesced task: its trigger, its message if it makes one, and its result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from celery.utils import uuid

from . import signals
from .calls import CALLBACKS, HEADER, captured, encode, eta_header, follower_of, is_rpc, moment
from .context import ATTRIBUTE, Run
from .dispatch import publish_all, run_header
from .endings import done_once, take_back, tell_caller
from .engine import engine_of
from .errors import CoalesceError, QueueFull
from .keys import state_id
from .records import Accepted, Trigger
from .states import Disposition, RunState
from .ticks import tick_of
from .triggering import Asking, report
from .views import RunMeta

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from .policy import Policy
    from .pushing import Pusher
    from .result import CoalescedResult

__all__ = ["Call", "ExemptCall"]

logger = logging.getLogger("celery_coalesce")

#: Options that the record holds for the message: a broker that drops an expired one in silence would cost a minute.
HELD = frozenset({"headers", "countdown", "eta", "expires", "add_to_parent"})

#: Positional and keyword arguments of a call.
Arguments = tuple[Sequence[Any], Mapping[str, Any]]
Plain = Callable[..., Any]


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


def _let_go(result: AsyncResult) -> None:
    """Let a result go that the caller gets another one of.

    As it goes it would unsubscribe from what that one waits for (celery.result.AsyncResult.__del__, 5.5-5.7).
    """
    result.backend = None


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
        state: The key's state id.
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
        self.app = app = task.app
        self._engine = engine_of(app)
        self.state = state_id(policy.scope, key)
        self._is_rpc = is_rpc(app)
        self._follows = task_id is not None or self._is_rpc or any(map(options.get, CALLBACKS))
        self._call = call = captured(app, options)
        self._arguments = args, kwargs = _dumped(task, arguments, options)
        self._serializer = serializer = _serializer(task, options)
        self._task_id = task_id or uuid()
        follower = follower_of(str(task.name), self._task_id, call) if self._follows else None
        ignored = options.get("ignore_result")
        self._stores = not (task.ignore_result if ignored is None else ignored)
        self._trigger = Trigger(
            task_id=self._task_id,
            key=key,
            args=encode((args, kwargs), serializer),
            call=encode(call, serializer) if call else b"",
            follower=encode(follower, serializer) if follower else b"",
            store=self._stores,
            times=self._times(),
            within=self._within(),
            watch=signals.is_watched(signals.coalesce_trigger, self._engine.producer_bus),
            needs=policy.needs(args, kwargs) if policy.constraints else (),
            labels=policy.labels_of(args, kwargs) if policy.labels else {},
            tick=tick_of(str(task.name), args, kwargs),
        )
        self.accepted: Accepted | None = None
        self.uncoalesced = False
        self._undone = False
        self._result: CoalescedResult | None = None

    def ask(self) -> Asking:
        """Return its trigger, and what else is known of it."""
        return Asking(self._policy, self._trigger, self._arguments, self._serializer)

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

    @property
    def can_be_pushed(self) -> bool:
        """Whether its message, if it makes one at once, may be pushed by a script: to this broker, and not later."""
        times = self._trigger.times
        waits = self._policy.delay is not None or "delay" in times or "due" in times
        return not (waits or self._is_rpc or "connection" in self._options)

    def make_message(self, pusher: Pusher, producer: Any) -> None:
        """Have the message made that is pushed if the call is dispatched."""

        def publish(run: str) -> None:
            options = self._message_options(run, 0)
            headers = {**options["headers"], "ignore_result": not self._stores}
            # A result is subscribed to once it is known that this call has one of its own.
            options |= {"headers": headers, "ignore_result": True, "retry": False}
            _let_go(self._plain(task_id=self._task_id, producer=producer, **options))

        self._trigger = replace(self._trigger, push=pusher.made(producer, publish))

    def take(self, reply: object) -> None:
        """Take what became of the trigger."""
        if not isinstance(reply, Accepted):
            raise CoalesceError(f"{self._task.name}: the state server gave no answer to a trigger: {reply!r}")
        self.accepted = reply
        if self._engine.pusher is not None and reply.disposition is not Disposition.DISPATCHED:
            self._engine.pusher.note(self.state)
        elif self._trigger.push is not None and reply.delay is None and self._stores:
            # As celery.app.base.Celery.send_task (5.5-5.7) does before it publishes.
            self._task.backend.on_task_call(None, reply.task_id)

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
        return self.dispatches or (self._is_rpc and self.accepted.disposition is not Disposition.REJECTED)

    def publish(self, producer: Any) -> None:
        """Publish the message of its run; without a message, declare the caller's reply queue as publishing would."""
        if self.accepted is None:
            self._publish_uncoalesced(producer)
        elif self.dispatches:
            self._publish_run(self.accepted, producer)
        else:
            with self.app.producer_or_acquire(producer) as one:
                self._task.backend.on_task_call(one, self._task_id)

    def _publish_run(self, accepted: Accepted, producer: Any) -> None:
        options = self._message_options(accepted.run, accepted.delay or 0)
        _let_go(self._plain(task_id=accepted.task_id, producer=producer, **options))

    def _message_options(self, run: str, delay: int) -> dict[str, Any]:
        """Return what the message of a run is published with, that waits for some milliseconds."""
        headers = {**(self._options.get("headers") or {}), HEADER: run_header(self.state, run, wait=delay)}
        if delay:
            headers["eta"] = eta_header(delay)
        options = {name: value for name, value in self._options.items() if name not in HELD}
        return {**options, "expires": None, "headers": headers, "add_to_parent": False}

    def _publish_uncoalesced(self, producer: Any) -> None:
        """Publish without coalescing; the gate admits the message once the state server is back."""
        logger.warning(
            "The state server is away: %s was published without coalescing",
            self._task.name,
            extra={"action": "published_uncoalesced", "task": self._task.name},
        )
        result: CoalescedResult = self._plain(task_id=self._task_id, producer=producer, **self._options)
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
            self._policy, self._key, self._answer, triggers=1 + len(joined), labels=self._trigger.labels
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
        if accepted.sent:
            publish_all(self._engine, accepted.sent)
        if self._undone:
            return
        report(self._engine.producer_bus, self._policy, self._trigger, accepted, self._arguments)
        if self._follows and accepted.run_state is RunState.ENDED:
            ending = done_once(self.app, self._policy.task, accepted.task_id)
            tell_caller(self.app, self._policy.task, self._task_id, self._call, ending)

    def result(self) -> CoalescedResult:
        """Return the result."""
        if self._result is not None:
            return self._result
        accepted = self._answer
        covered = accepted.disposition in (Disposition.COALESCED, Disposition.SKIPPED) and not self._follows
        task_id = accepted.task_id if covered else self._task_id
        result: CoalescedResult = self._task.AsyncResult(task_id)
        result.ignored = not self._stores
        result.described(accepted.disposition, self._key, int(accepted.run), accepted.task_id)
        if accepted.disposition is Disposition.REJECTED:
            return result.refused(QueueFull(self._policy.task, self._key, int(accepted.run)))
        parent = self.app.current_worker_task
        if parent is not None and self._options.get("add_to_parent", True):
            parent.add_trail(result)
        return result.done() if covered and accepted.run_state is RunState.ENDED else result
