"""One call of a coalesced task: its trigger, its message if it makes one, and its result."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from celery.utils import uuid

from . import signals
from .calls import CALLBACKS, HEADER, captured, encode, eta_header, follower_of, is_rpc, moment
from .context import ATTRIBUTE, Run
from .dispatch import publish_all, run_header
from .endings import done_once, tell_caller
from .engine import engine_of
from .errors import CoalesceError, QueueFull, StoreUnavailable
from .keys import state_id
from .records import Accepted, RolledBack, RunMeta, Trigger
from .states import Disposition, Outage, RunState
from .triggering import accept, report

if TYPE_CHECKING:
    from .policy import Policy
    from .result import CoalescedResult

__all__ = ["Call"]

logger = logging.getLogger("celery_coalesce")

#: Options that the record holds for the message: a broker that drops an expired one in silence would cost a minute.
HELD = frozenset({"headers", "countdown", "eta", "expires", "add_to_parent"})


class Call:
    """A call whose key is known.

    Args:
        task: The task.
        policy: Its options, as the call overrides them.
        key: The call's key.
        plain: Celery's own ``apply_async`` of the task, with the call's arguments.
        options: The call's options.
    """

    def __init__(
        self, task: Any, policy: Policy, key: str, plain: Callable[..., Any], options: Mapping[str, Any]
    ) -> None:
        self._task = task
        self._policy = policy
        self._key = key
        self._plain = plain
        self._options = options
        self._app = task.app
        self._engine = engine_of(task.app)
        self._state = state_id(policy.scope, key)

    def make(self, arguments: tuple[Sequence[Any], Mapping[str, Any]], task_id: str | None) -> CoalescedResult:
        """Make the call.

        Args:
            arguments: Positional and keyword arguments.
            task_id: The id that the caller gave it.

        Raises:
            QueueFull: Enough runs wait.
            StoreUnavailable: The state server can not be reached, and calls are not published without it.
            kombu.exceptions.OperationalError: The broker can not be reached.
        """
        options = self._options
        follows = task_id is not None or is_rpc(self._app) or any(options.get(name) for name in CALLBACKS)
        arguments = self._dumped(arguments)
        trigger = self._trigger(arguments, task_id or uuid(), follows=follows)
        try:
            accepted = accept(self._engine, self._policy, trigger, arguments, self._serializer)
        except StoreUnavailable:
            if self._engine.settings.on_outage is Outage.RAISE:
                raise
            return self._uncoalesced(trigger)
        if not isinstance(accepted, Accepted):
            raise CoalesceError(f"{self._task.name}: the state server gave no answer to a trigger: {accepted!r}")
        if accepted.delay is not None and accepted.disposition in (Disposition.DISPATCHED, Disposition.QUEUED):
            self._publish(accepted)
        elif accepted.disposition is not Disposition.REJECTED and is_rpc(self._app):
            self._expect_reply(trigger.task_id)
        publish_all(self._engine, accepted.sent)
        report(self._engine.producer_bus, self._policy, trigger, accepted, arguments)
        if follows and accepted.run_state is RunState.ENDED:
            ending = done_once(self._app, self._policy.task, accepted.task_id)
            call = captured(self._app, self._options)
            tell_caller(self._app, self._policy.task, trigger.task_id, call, ending)
        if accepted.disposition is Disposition.REJECTED:
            raise QueueFull(self._policy.task, self._key, int(accepted.run))
        covered = accepted.disposition in (Disposition.COALESCED, Disposition.SKIPPED)
        return self._result(trigger, accepted, accepted.task_id if covered and not follows else trigger.task_id)

    @property
    def _serializer(self) -> str | None:
        chosen: str | None = self._options.get("serializer") or self._task.serializer
        return chosen

    def _trigger(self, arguments: tuple[Sequence[Any], Mapping[str, Any]], task_id: str, *, follows: bool) -> Trigger:
        args, kwargs = arguments
        call = captured(self._app, self._options)
        follower = follower_of(str(self._task.name), task_id, call) if follows else None
        ignored = self._options.get("ignore_result")
        return Trigger(
            task_id=task_id,
            key=self._key,
            args=encode((args, kwargs), self._serializer),
            call=encode(call, self._serializer) if call else b"",
            follower=encode(follower, self._serializer) if follower else b"",
            store=not (self._task.ignore_result if ignored is None else ignored),
            times=self._times(),
            within=self._within(),
            watch=signals.is_watched(signals.coalesce_trigger, self._engine.producer_bus),
            needs=self._policy.needs(args, kwargs),
            labels=self._policy.labels_of(args, kwargs),
        )

    def _times(self) -> dict[str, int]:
        """Return the call's due time and expiry."""
        times: dict[str, int] = {}
        countdown, eta = self._options.get("countdown"), self._options.get("eta")
        expires = self._options.get("expires", self._task.expires)
        if countdown:
            times["delay"] = math.ceil(float(countdown) * 1000)
        elif eta:
            times["due"] = moment(self._app, eta)
        if isinstance(expires, int | float):
            times["ttl"] = math.ceil(expires * 1000)
        elif expires is not None:
            times["expires"] = moment(self._app, expires)
        return times

    def _within(self) -> str | None:
        parent = self._app.current_worker_task
        run = parent.request.__dict__.get(ATTRIBUTE) if parent is not None else None
        return run.lease.run if isinstance(run, Run) else None

    def _dumped(self, arguments: tuple[Sequence[Any], Mapping[str, Any]]) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Return arguments without pydantic models, as ``apply_async`` of Celery 5.7 sends them."""
        dump = getattr(self._task, "_dump_pydantic_arguments", None)
        if dump is None or self._options.get("serializer") == "pickle":
            return arguments
        dumped: tuple[Sequence[Any], Mapping[str, Any]] = dump(*arguments)
        return dumped

    def _publish(self, accepted: Accepted) -> None:
        """Publish this trigger's own run, or take it back."""
        headers = {**(self._options.get("headers") or {}), HEADER: run_header(self._state, accepted.run)}
        if accepted.delay:
            headers["eta"] = eta_header(accepted.delay)
        options = {name: value for name, value in self._options.items() if name not in HELD}
        try:
            self._plain(task_id=accepted.task_id, **options, expires=None, headers=headers, add_to_parent=False)
        except BaseException:
            self._take_back(accepted)
            raise

    def _take_back(self, accepted: Accepted) -> None:
        try:
            undone = self._engine.transitions.rollback(self._state, accepted.run, accepted.task_id)
        except CoalesceError:
            logger.warning(
                "Run %s could be neither published nor taken back; it will be dispatched again",
                accepted.run,
                extra={"action": "rollback_failed", "run_id": accepted.run},
            )
            return
        publish_all(self._engine, undone.sent)
        if undone.drained is not None:
            bus = self._engine.producer_bus
            signals.emit(signals.coalesce_drain, self._task, bus, self._drained(accepted, undone, undone.drained))

    def _drained(self, accepted: Accepted, undone: RolledBack, session: int) -> RunMeta:
        """Return what announces the drain of a session whose last run was taken back."""
        return RunMeta(
            key=self._key,
            scope=self._policy.scope,
            type="task" if self._policy.whole_task else "key",
            name=self._policy.task,
            task_id=accepted.task_id,
            state_id=self._state,
            session_id=session,
            run_id=int(accepted.run),
            run_index=undone.last_index,
            attempt=0,
            token=0,
            triggers=1,
        )

    def _expect_reply(self, task_id: str) -> None:
        """Declare the caller's reply queue, as publishing would have."""
        with self._app.producer_or_acquire(self._options.get("producer")) as producer:
            self._task.backend.on_task_call(producer, task_id)

    def _uncoalesced(self, trigger: Trigger) -> CoalescedResult:
        """Publish without coalescing; the gate admits the message once the state server is back."""
        logger.warning(
            "The state server is away: %s was published without coalescing",
            self._task.name,
            extra={"action": "published_uncoalesced", "task": self._task.name},
        )
        result: CoalescedResult = self._plain(task_id=trigger.task_id, **self._options)
        return result.described(Disposition.DISPATCHED, self._key)

    def _result(self, trigger: Trigger, accepted: Accepted, task_id: str) -> CoalescedResult:
        result: CoalescedResult = self._task.AsyncResult(task_id)
        result.ignored = not trigger.store
        parent = self._app.current_worker_task
        if parent is not None and self._options.get("add_to_parent", True):
            parent.add_trail(result)
        return result.described(accepted.disposition, self._key, int(accepted.run), accepted.task_id)
