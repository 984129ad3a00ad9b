"""A call of a coalesced task: its trigger, its message if it makes one, and its result."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.utils import uuid

from .calls import HEADER, captured, encode, eta_header, follower_of
from .dispatch import publish_all, run_header
from .endings import done_once, take_back, tell_caller
from .errors import CoalesceError, QueueFull
from .keys import state_id
from .records import Accepted, Trigger
from .states import Disposition, RunState
from .terms import dumped, serializer_of
from .ticks import tick_of
from .triggering import Asking, report
from .views import RunMeta

if TYPE_CHECKING:
    from celery.result import AsyncResult

    from .broker import Broker
    from .result import CoalescedResult
    from .terms import Arguments, Plain, Terms

__all__ = ["Call", "ExemptCall"]

logger = logging.getLogger("celery_coalesce")

#: Options that the record holds for the message: a broker that drops an expired one in silence would cost a minute.
HELD = frozenset({"headers", "countdown", "eta", "expires", "add_to_parent"})


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
        serializer = serializer_of(task, options)
        for value in (dumped(task, arguments, options), captured(task.app, options, task.app.current_worker_task)):
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
        terms: What it has in common with the calls that are made together with it.
        key: The call's key.
        arguments: Positional and keyword arguments.
        task_id: The id that the caller gave it.

    Attributes:
        terms: The same.
        state: The key's state id.
        trigger: What it asks for.
        accepted: What became of the trigger, once that is known.
        uncoalesced: Whether it is published without coalescing, because the state server is away.

    Raises:
        InvalidKey: The name of a constraint, or a label, can not be made.
        kombu.exceptions.EncodeError: Arguments can not be serialized.
    """

    accepted: Accepted | None = None
    uncoalesced = False
    _undone = False
    _result: CoalescedResult | None = None

    def __init__(self, terms: Terms, key: str, arguments: Arguments, task_id: str | None = None) -> None:
        policy, name = terms.policy, terms.policy.task
        self.terms = terms
        self.state = state_id(policy.scope, key)
        self._given = arguments
        self._arguments = args, kwargs = dumped(terms.task, arguments, terms.options)
        self._follows = terms.follows or task_id is not None
        own_id = task_id or uuid()
        self.trigger = Trigger(
            task_id=own_id,
            key=key,
            args=encode((args, kwargs), terms.serializer),
            call=terms.called,
            follower=encode(follower_of(name, own_id, terms.call), terms.serializer) if self._follows else b"",
            store=terms.stores,
            times=terms.times,
            within=terms.within,
            watch=terms.watched,
            needs=policy.needs(args, kwargs) if policy.constraints else (),
            labels=policy.labels_of(args, kwargs) if policy.labels else {},
            tick=tick_of(name, args, kwargs),
        )

    def ask(self) -> Asking:
        """Return its trigger, and what else is known of it."""
        return Asking(self.terms.policy, self.trigger, self._arguments, self.terms.serializer)

    def make_message(self, broker: Broker, producer: Any) -> None:
        """Have the message made that is pushed if the call is dispatched."""

        def publish(run: str) -> None:
            # The backend hears of it once it is known that this call has a result of its own.
            options = self._untold(self._message_options(run, self.trigger.task_id)) | {"retry": False}
            _let_go(self.terms.plain(*self._given, task_id=self.trigger.task_id, producer=producer, **options))

        self.trigger = self.trigger._replace(push=broker.push_of(producer, publish))

    def take(self, reply: object) -> None:
        """Take what became of the trigger."""
        if not isinstance(reply, Accepted):
            raise CoalesceError(f"{self.terms.task.name}: the state server gave no answer to a trigger: {reply!r}")
        self.accepted = reply
        broker = self.terms.engine.broker
        if broker is not None and self.met_a_busy_key:
            broker.note_busy(self.state)
        elif self.trigger.push is not None and reply.delay is None and self.terms.stores and self.terms.backend_hears:
            # As celery.app.base.Celery.send_task (5.5-5.7) does before it publishes.
            self.terms.app.backend.on_task_call(None, reply.task_id)

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
    def met_a_busy_key(self) -> bool:
        """Whether it was not dispatched at once."""
        return self._answer.disposition is not Disposition.DISPATCHED

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
        return self.dispatches or (self.terms.is_rpc and self.accepted.disposition is not Disposition.REJECTED)

    def publish(self, producer: Any) -> None:
        """Publish the message of its run; without a message, declare the caller's reply queue as publishing would."""
        if self.accepted is None:
            self._publish_uncoalesced(producer)
        elif self.dispatches:
            self._publish_run(self.accepted, producer)
        else:
            with self.terms.app.producer_or_acquire(producer) as one:
                self.terms.task.backend.on_task_call(one, self.trigger.task_id)

    def _publish_run(self, accepted: Accepted, producer: Any) -> None:
        options = self._told_if_wanted(self._message_options(accepted.run, accepted.task_id, accepted.delay or 0))
        _let_go(self.terms.plain(*self._given, task_id=accepted.task_id, producer=producer, **options))

    def _message_options(self, run: str, task_id: str, delay: int = 0) -> dict[str, Any]:
        """Return what the message of a run is published with, that waits for some milliseconds."""
        header = run_header(self.state, run, task_id, wait=delay)
        headers = {**(self.terms.options.get("headers") or {}), HEADER: header}
        if delay:
            headers["eta"] = eta_header(delay)
        options = {name: value for name, value in self.terms.options.items() if name not in HELD}
        return {**options, "expires": None, "headers": headers, "add_to_parent": False}

    def _told_if_wanted(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return what a message is published with, and its result backend hears of it only if it wants to."""
        return options if self.terms.backend_hears else self._untold(options)

    def _untold(self, options: dict[str, Any]) -> dict[str, Any]:
        """Return what a message is published with, and its result backend hears nothing of it."""
        headers = {**(options.get("headers") or {}), "ignore_result": not self.terms.stores}
        return {**options, "headers": headers, "ignore_result": True}

    def _publish_uncoalesced(self, producer: Any) -> None:
        """Publish without coalescing; the gate admits the message once the state server is back."""
        logger.warning(
            "The state server is away: %s was published without coalescing",
            self.terms.task.name,
            extra={"action": "published_uncoalesced", "task": self.terms.task.name},
        )
        given = {**self.terms.options, "task_id": self.trigger.task_id, "producer": producer}
        result: CoalescedResult = self.terms.plain(*self._given, **self._told_if_wanted(given))
        result.ignored = not self.terms.stores
        self._result = result.described(Disposition.DISPATCHED, self.trigger.key)

    def take_back(self, covered: Sequence[Call]) -> None:
        """Take its run back, which could not be published, unless others have joined it.

        Args:
            covered: The calls that it covers, of those that were made together.

        Raises:
            CoalesceError: The state server can not be reached, or refused.
        """
        joined = [call for call in covered if call._answer.disposition is Disposition.COALESCED]
        run = RunMeta.unstarted(
            self.terms.policy, self.trigger.key, self._answer, triggers=1 + len(joined), labels=self.trigger.labels
        )
        followers = sum(call._follows for call in joined)
        if take_back(self.terms.engine, run, self.terms.engine.producer_bus, followers=followers):
            for call in covered:
                call._undone = True

    def conclude(self) -> None:
        """Do what others have to do about the trigger, report it, and tell a caller whose call needs no run."""
        accepted = self.accepted
        if accepted is None:
            return
        if accepted.sent:
            publish_all(self.terms.engine, accepted.sent)
        if self._undone:
            return
        terms = self.terms
        report(terms.engine.producer_bus, terms.policy, self.trigger, accepted, self._arguments)
        if self._follows and accepted.run_state is RunState.ENDED:
            ending = done_once(terms.app, terms.policy.task, accepted.task_id)
            tell_caller(terms.app, terms.policy.task, self.trigger.task_id, terms.call, ending)

    def result(self) -> CoalescedResult:
        """Return the result."""
        if self._result is not None:
            return self._result
        accepted = self._answer
        if self._follows or accepted.disposition not in (Disposition.COALESCED, Disposition.SKIPPED):
            return self._described(accepted, self.trigger.task_id)
        # One run has one result, whichever of these calls it covers: to make one takes longer than the call.
        ended = accepted.run_state is RunState.ENDED
        named = (accepted.run, accepted.disposition, ended)
        result = self.terms.covered.get(named)
        if result is None:
            result = self.terms.covered[named] = self._described(accepted, accepted.task_id)
            if ended:
                result.done()
        return result

    def _described(self, accepted: Accepted, task_id: str) -> CoalescedResult:
        terms, key = self.terms, self.trigger.key
        result: CoalescedResult = terms.task.AsyncResult(task_id)
        result.ignored = not terms.stores
        result.described(accepted.disposition, key, int(accepted.run), accepted.task_id)
        if accepted.disposition is Disposition.REJECTED:
            return result.refused(QueueFull(terms.policy.task, key, int(accepted.run)))
        if terms.parent is not None and terms.options.get("add_to_parent", True):
            terms.parent.add_trail(result)
        return result
