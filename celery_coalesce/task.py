"""``CoalescedTask``: the base class of a task whose calls coalesce by key."""

from __future__ import annotations

import inspect
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import Task
from celery.app.task import Context
from celery.exceptions import Ignore
from celery.utils import uuid

from . import replacements, signals
from .calls import HEADER, captured, encode, eta_header, follower_of, is_rpc, moment
from .context import ATTRIBUTE, InlineRun, NextAttempt, Run
from .dispatch import publish_all, run_header
from .endings import tell_cleared
from .engine import engine_of
from .errors import CoalesceError, OptionError, QueueFull, StoreUnavailable
from .install import install
from .keys import state_id
from .policy import Policy
from .records import Accepted, Lease, RolledBack, RunMeta, Trigger
from .result import CoalescedResult
from .states import Disposition, Outage
from .triggering import accept, report

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature

__all__ = ["CoalescedTask"]

logger = logging.getLogger("celery_coalesce")

OURS = "celery_coalesce.worker.request:CoalescedRequest"


def _guarded(call: Callable[..., Any]) -> Callable[..., Any]:
    """Return a ``__call__`` that looks at the run's lease once the body has returned."""

    def __call__(self: CoalescedTask, *args: Any, **kwargs: Any) -> Any:
        run = self.request.__dict__.get(ATTRIBUTE)
        if run is None or self.request.called_directly:
            return call(self, *args, **kwargs)
        request = self.request
        calls_on = bool(request.callbacks or request.errbacks or request.chain or request.chord)
        return run.execute(partial(call, self), args, kwargs, calls_on)

    __call__.__coalesce_guard__ = True  # type: ignore[attr-defined]
    return __call__


class CoalescedTask(Task):
    """A task whose calls for one key collapse into one run now and at most one follow-up, and never overlap.

    ::

        @app.task(base=CoalescedTask, coalesce_key="org:<org_id>")
        def process(org_id): ...

    The options, all validated when the task is bound to its app:

    Attributes:
        coalesce_key: A template over the task's parameters, or a callable with the task's own signature that returns the
            key, or ``None`` for a call that is exempt. Unset: the whole task is one key.
        coalesce_scope: What keys are unique in; the task's name unless tasks share one.
        coalesce: ``"queue"``, ``"skip"`` or ``"serialize"``. In a body, ``self.coalesce`` is the run.
        coalesce_max_queued: How many runs of a key may wait (``queue``).
        coalesce_overflow: ``"merge"`` into the last of these, or ``"reject"``.
        coalesce_args: ``"latest"``, ``"first"`` or ``merge(earlier, later)`` over bound arguments.
        coalesce_limit: How many runs of a key may go on at once.

    .. versionadded:: 0.1
    """

    Request = OURS

    #: What the task declared; ``None`` for Celery's own tasks under ``task_cls=CoalescedTask``.
    coalesce_policy: Policy | None = None

    #: Why the task was refused. Celery registers a task before it is bound: one that was refused must not run as a plain one.
    coalesce_refused: OptionError | None = None

    # -- declaring ---------------------------------------------------------------------------------------------------

    @classmethod
    def bind(cls, app: Celery) -> Celery:
        """Bind the task to its app, validate its options, and install what workers need.

        Raises:
            OptionError: An option is unknown, bad, or contradicts another.
        """
        bound = super().bind(app)
        if cls.name is not None:
            try:
                cls._bind_policy()
            except OptionError as error:
                cls.coalesce_refused = error
                raise
            install(app)
        return bound

    @classmethod
    def _bind_policy(cls) -> None:
        options = cls._declared()
        name = str(cls.name)
        if name.startswith("celery.") and not options:
            cls.coalesce_policy = None
        else:
            run = inspect.getattr_static(cls, "run")
            static = isinstance(run, staticmethod)
            cls.coalesce_policy = Policy.declare(name, run.__func__ if static else run, not static, options)
        cls._refuse_other_request()
        if not getattr(cls.__call__, "__coalesce_guard__", False):
            # A subclass overrides __call__, perhaps without super(): the guard goes around it.
            cls.__call__ = _guarded(cls.__call__)  # type: ignore[method-assign]

    @classmethod
    def _declared(cls) -> dict[str, Any]:
        """Take the options out of the class's attributes: ``self.coalesce`` is the run, not the option."""
        kept: dict[str, Any] | None = cls.__dict__.get("_coalesce_declared")
        if kept is not None:
            return kept
        options: dict[str, Any] = {}
        own = set(CoalescedTask.__dict__)
        for ancestor in reversed(cls.__mro__):
            if issubclass(CoalescedTask, ancestor):
                continue
            for name, value in ancestor.__dict__.items():
                if name == "coalesce" and isinstance(value, property):
                    # An ancestor that was bound itself: what it declared is kept beside.
                    options.update(ancestor.__dict__.get("_coalesce_declared") or {})
                elif name == "coalesce" or (name.startswith("coalesce_") and name not in own):
                    options[name] = value.__func__ if isinstance(value, staticmethod) else value
        cls._coalesce_declared = options
        cls.coalesce = CoalescedTask.__dict__["coalesce"]  # type: ignore[method-assign]
        return options

    @classmethod
    def _refuse_other_request(cls) -> None:
        if isinstance(cls.Request, str):
            if cls.Request == OURS:
                return
        else:
            from .worker.request import CoalescedRequest

            if issubclass(cls.Request, CoalescedRequest):
                return
        raise OptionError(
            str(cls.name),
            "Request",
            cls.Request,
            "takes the gate away",
            "derive it from celery_coalesce.worker.request.CoalescedRequest",
        )

    # -- running -----------------------------------------------------------------------------------------------------

    @property
    def coalesce(self) -> InlineRun:
        """The run that the body is in: every field of :class:`~celery_coalesce.RunMeta`, and ``check()``."""
        run: InlineRun | None = self.request.__dict__.get(ATTRIBUTE)
        return run if run is not None else InlineRun(self._inline_meta(self.request))

    def _inline_meta(self, request: Context) -> RunMeta:
        policy = self._policy()
        key = policy.key(request.args or (), request.kwargs or {}) or ""
        return RunMeta(
            key=key,
            scope=policy.scope,
            type="task" if policy.whole_task else "key",
            name=policy.task,
            task_id=request.id or "",
            state_id=state_id(policy.scope, key),
            session_id=0,
            run_id=0,
            run_index=0,
            attempt=request.retries or 0,
            token=0,
            triggers=1,
        )

    def _policy(self) -> Policy:
        self._get_app()
        if self.coalesce_refused is not None:
            raise self.coalesce_refused
        if self.coalesce_policy is None:
            raise CoalesceError(f"{self.name} does not coalesce: it is one of Celery's own tasks")
        return self.coalesce_policy

    def _own_run(self) -> Run | None:
        """Return the run that this very call is made from, if it is made from the body of this task."""
        run = self.request.__dict__.get(ATTRIBUTE)
        return run if isinstance(run, Run) else None

    __call__ = _guarded(Task.__call__)

    def on_replace(self, sig: Signature) -> Any:
        """Send the task that replaces this one once this attempt has ended.

        A coalesced task of the same key takes over the run. For anything else the key goes on, and the run's followers are completed
        by the replacement.
        """
        run = self._own_run()
        if run is None or self.request.is_eager:
            return super().on_replace(sig)
        if self._takes_over(run, sig):
            options = dict(sig.options)
            run.next_attempt = NextAttempt(sig.task, sig.args, sig.kwargs, options)
            raise Ignore("Replaced by the same key's task, once this attempt has ended")
        followers = run.coalescer.followers(run.lease)
        if followers is None:
            run.lost = True
            raise Ignore("The lease was lost")
        run.handed_on = len(followers)
        if followers:
            replacements.complete_with(run.bus, sig, followers)
        return super().on_replace(sig)

    def _takes_over(self, run: Run, sig: Signature) -> bool:
        task = self._get_app().tasks.get(sig.task)
        if not isinstance(task, CoalescedTask) or task.coalesce_policy is None:
            return False
        policy = task.coalesce_policy
        if policy.scope != run.lease.scope or set(sig.options) & {"coalesce_key", "coalesce"}:
            return False
        return policy.key(sig.args, sig.kwargs) == run.lease.key

    # -- calling -----------------------------------------------------------------------------------------------------

    def AsyncResult(self, task_id: str, **kwargs: Any) -> CoalescedResult:  # noqa: N802 - Celery's name
        """Return the result with a task id."""
        return CoalescedResult(task_id, backend=self.backend, task_name=self.name, app=self._get_app(), **kwargs)

    def apply_async(
        self,
        args: Sequence[Any] | None = None,
        kwargs: Mapping[str, Any] | None = None,
        task_id: str | None = None,
        producer: Any = None,
        link: Any = None,
        link_error: Any = None,
        shadow: str | None = None,
        **options: Any,
    ) -> Any:
        """Ask for a run of the call's key. Takes whatever Celery's ``apply_async`` does, and the per-call options.

        Args:
            args: The positional arguments.
            kwargs: The keyword arguments.
            task_id: The call's own task id. If another call's run covers it, it is completed with that run.
            producer: A kombu producer to publish with.
            link: Signatures to call with the result.
            link_error: Signatures to call on failure.
            shadow: The name to show.
            options: Celery's options, and ``coalesce``, ``coalesce_key`` (``None``: this call is exempt), ``coalesce_args``,
                ``coalesce_max_queued``, ``coalesce_overflow`` for this call alone.

        Returns:
            A :class:`~celery_coalesce.CoalescedResult` (an ``EagerResult`` under ``task_always_eager``).

        Raises:
            InvalidKey: The key is not a non-empty string.
            OptionError: A per-call option is unknown or bad.
            QueueFull: ``coalesce_overflow="reject"``, and enough runs wait.
            StoreUnavailable: The state server can not be reached, and ``coalesce_on_outage`` is ``"raise"``.
            TypeError: The arguments do not fit the task's parameters.
            kombu.exceptions.OperationalError: The broker can not be reached. Nothing is left behind.

        .. versionadded:: 0.1
        """
        app = self._get_app()
        overrides = {
            name: options.pop(name) for name in list(options) if name == "coalesce" or name.startswith("coalesce_")
        }
        if self._continues(task_id, args, kwargs, link, link_error, shadow, options):
            return self.AsyncResult(task_id or "")
        plain = partial(
            super().apply_async,
            args,
            kwargs,
            producer=producer,
            link=link,
            link_error=link_error,
            shadow=shadow,
        )
        if self.coalesce_refused is not None:
            raise self.coalesce_refused
        if self.coalesce_policy is None:
            return plain(task_id=task_id, **options)
        policy = self.coalesce_policy.override({n: v for n, v in overrides.items() if n != "coalesce_key"})
        if app.conf.task_always_eager:
            return plain(task_id=task_id, **options)
        if self.typing:
            self.__header__(*(args or ()), **(kwargs or {}))
        header = (options.get("headers") or {}).get(HEADER)
        if isinstance(header, dict) and header.get("exempt") is True:
            # The retry of an exempt call is exempt.
            overrides["coalesce_key"] = None
        if "coalesce_key" in overrides:
            given = overrides["coalesce_key"]
            key = None if given is None else policy.checked(given)
        else:
            key = policy.key(args or (), kwargs or {})
        if key is None:
            options["headers"] = {**(options.get("headers") or {}), HEADER: {"exempt": True}}
            result: CoalescedResult = plain(task_id=task_id, **options)
            return result.described(Disposition.EXEMPT, None)
        return self._trigger(app, policy, key, plain, (args or (), kwargs or {}), task_id, {
            "producer": producer, "link": link, "link_error": link_error, "shadow": shadow, **options,
        })  # fmt: skip

    def _trigger(
        self,
        app: Celery,
        policy: Policy,
        key: str,
        plain: Callable[..., Any],
        arguments: tuple[Sequence[Any], Mapping[str, Any]],
        task_id: str | None,
        options: dict[str, Any],
    ) -> CoalescedResult:
        engine = engine_of(app)
        own_id = task_id or uuid()
        call = captured(app, options)
        args, kwargs = self._dumped(arguments, options)
        serializer = options.get("serializer") or self.serializer
        # A call whose caller waits for this very id, or for its callbacks, can not be answered with another's.
        follows = (
            task_id is not None
            or is_rpc(app)
            or any(options.get(name) for name in ("link", "link_error", "chain", "chord", "group_id"))
        )
        ignored = options.get("ignore_result")
        trigger = Trigger(
            task_id=own_id,
            key=key,
            args=encode([list(args), dict(kwargs)], serializer),
            call=encode(call, serializer) if call else b"",
            follower=encode(follower_of(str(self.name), own_id, call), serializer) if follows else b"",
            store=not (self.ignore_result if ignored is None else ignored),
            times=self._times(app, options),
            within=self._within(app),
            watch=signals.is_watched(signals.coalesce_trigger, engine.producer_bus),
        )
        try:
            accepted = accept(app, engine.coalescer, policy, trigger, (args, kwargs), serializer)
        except StoreUnavailable:
            if engine.settings.on_outage is Outage.RAISE:
                raise
            logger.warning(
                "The state server is away: %s was published without coalescing",
                self.name,
                extra={"action": "published_uncoalesced", "task": self.name},
            )
            return self._plain_call(plain, own_id, options).described(Disposition.DISPATCHED, key)
        if not isinstance(accepted, Accepted):
            raise CoalesceError(f"{self.name}: the state server gave no answer to a trigger: {accepted!r}")
        if accepted.delay is not None and accepted.disposition in (
            Disposition.DISPATCHED,
            Disposition.QUEUED,
        ):
            self._publish(app, plain, policy, key, accepted, options)
        elif accepted.disposition is not Disposition.REJECTED and is_rpc(app):
            self._expect_reply(app, own_id, options)
        publish_all(app, engine.coalescer, accepted.sent)
        report(app, engine.producer_bus, policy, trigger, accepted, (args, kwargs))
        if accepted.disposition is Disposition.REJECTED:
            raise QueueFull(str(self.name), key, int(accepted.run))
        covered = accepted.disposition in (Disposition.COALESCED, Disposition.SKIPPED)
        result = self.AsyncResult(accepted.task_id if covered and not follows else own_id)
        result.ignored = not trigger.store
        parent = app.current_worker_task
        if parent is not None and options.get("add_to_parent", True):
            parent.add_trail(result)
        return result.described(accepted.disposition, key, int(accepted.run), accepted.task_id)

    def _publish(
        self,
        app: Celery,
        plain: Callable[..., Any],
        policy: Policy,
        key: str,
        accepted: Accepted,
        options: Mapping[str, Any],
    ) -> None:
        """Publish this trigger's own run, or take it back."""
        coalescer = engine_of(app).coalescer
        state = state_id(policy.scope, key)
        headers = {**(options.get("headers") or {}), HEADER: run_header(state, accepted.run)}
        if accepted.delay:
            headers["eta"] = eta_header(accepted.delay)
        # The record holds the times: a broker that drops an expired message in silence would cost a minute.
        given = {
            name: value
            for name, value in options.items()
            if name
            not in (
                "producer",
                "link",
                "link_error",
                "shadow",
                "headers",
                "countdown",
                "eta",
                "add_to_parent",
            )
        }
        try:
            plain(
                task_id=accepted.task_id,
                **{**given, "expires": None, "headers": headers, "add_to_parent": False},
            )
        except BaseException:
            try:
                undone = coalescer.rollback(state, accepted.run, accepted.task_id)
                publish_all(app, coalescer, undone.sent)
                self._announce_rollback(policy, key, accepted, undone)
            except CoalesceError:
                logger.warning(
                    "Run %s could be neither published nor taken back; it will be dispatched again",
                    accepted.run,
                    extra={"action": "rollback_failed", "run_id": accepted.run},
                )
            raise

    def _announce_rollback(self, policy: Policy, key: str, accepted: Accepted, undone: RolledBack) -> None:
        """Announce the drain of a session whose last run was taken back."""
        if undone.drained is None:
            return
        meta = RunMeta(
            key=key,
            scope=policy.scope,
            type="task" if policy.whole_task else "key",
            name=policy.task,
            task_id=accepted.task_id,
            state_id=state_id(policy.scope, key),
            session_id=undone.drained,
            run_id=int(accepted.run),
            run_index=undone.last_index,
            attempt=0,
            token=0,
            triggers=1,
        )
        signals.emit(signals.coalesce_drain, self, engine_of(self._get_app()).producer_bus, meta)

    def _plain_call(self, plain: Callable[..., Any], task_id: str, options: Mapping[str, Any]) -> CoalescedResult:
        given = {
            name: value for name, value in options.items() if name not in ("producer", "link", "link_error", "shadow")
        }
        result: CoalescedResult = plain(task_id=task_id, **given)
        return result

    def _expect_reply(self, app: Celery, task_id: str, options: Mapping[str, Any]) -> None:
        """Declare the caller's reply queue, as publishing would have."""
        with app.producer_or_acquire(options.get("producer")) as producer:
            self.backend.on_task_call(producer, task_id)

    def _dumped(
        self, arguments: tuple[Sequence[Any], Mapping[str, Any]], options: Mapping[str, Any]
    ) -> tuple[Sequence[Any], Mapping[str, Any]]:
        """Return arguments without pydantic models, as Celery 5.7's ``apply_async`` sends them."""
        dump = getattr(self, "_dump_pydantic_arguments", None)
        if dump is None or options.get("serializer") == "pickle":
            return arguments
        dumped: tuple[Sequence[Any], Mapping[str, Any]] = dump(*arguments)
        return dumped

    def _times(self, app: Celery, options: Mapping[str, Any]) -> dict[str, int]:
        """Return a call's due time and expiry."""
        times: dict[str, int] = {}
        countdown, eta = options.get("countdown"), options.get("eta")
        expires = options.get("expires", self.expires)
        if countdown:
            times["delay"] = math.ceil(float(countdown) * 1000)
        elif eta:
            times["due"] = moment(app, eta)
        if isinstance(expires, int | float):
            times["ttl"] = math.ceil(expires * 1000)
        elif expires is not None:
            times["expires"] = moment(app, expires)
        return times

    def _within(self, app: Celery) -> str | None:
        parent = app.current_worker_task
        run = parent.request.__dict__.get(ATTRIBUTE) if parent is not None else None
        return run.lease.run if isinstance(run, Run) else None

    def _continues(
        self,
        task_id: str | None,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        link: Any,
        link_error: Any,
        shadow: str | None,
        options: dict[str, Any],
    ) -> bool:
        """Keep back a retry of a run, which Celery would send before the attempt has ended.

        ``Task.retry`` and, after a lost worker, ``Request._retry_worker_lost`` (celery.worker.request, 5.7) come through
        ``apply_async`` with the same task id and a higher count of retries.
        """
        if not options.get("retries") or task_id is None:
            return False
        headers = options.get("headers") or {}
        attempt = NextAttempt(
            str(self.name),
            args or (),
            kwargs or {},
            {**options, "link": link, "link_error": link_error, "shadow": shadow},
        )
        run = self._own_run()
        if run is not None and self.request.id == task_id:
            run.next_attempt = attempt
            return True
        lease = Lease.from_header(headers.get(HEADER) or {})
        if lease is None or lease.task_id != task_id:
            return False
        from .reports import continue_run

        # The process that ran it is gone, and with it the attempt.
        engine = engine_of(self._get_app())
        if not continue_run(self._get_app(), engine.coalescer, lease, attempt):
            raise StoreUnavailable(f"run {lease.run} has lost its lease, and is not retried")
        return True

    # -- Django ------------------------------------------------------------------------------------------------------

    def delay_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Call ``delay`` when the current database transaction has been committed. Needs Django.

        As ``celery.contrib.django.task.DjangoTask.delay_on_commit``.
        """
        self.apply_async_on_commit(args, kwargs)

    def apply_async_on_commit(self, *args: Any, **kwargs: Any) -> None:
        """Call ``apply_async`` when the current database transaction has been committed. Needs Django.

        As ``celery.contrib.django.task.DjangoTask.apply_async_on_commit``.
        """
        from django.db import transaction

        transaction.on_commit(partial(self.apply_async, *args, **kwargs))

    # -- operating ---------------------------------------------------------------------------------------------------

    def clear_key(self, *args: Any, **kwargs: Any) -> int:
        """Forget what is pending of the key that a call with these arguments has.

        A run in progress keeps its slot until it ends. The results of what was pending become ``REVOKED``.

        Args:
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.

        Returns:
            How many runs were forgotten.

        Raises:
            InvalidKey: The call has no key.
            StoreUnavailable: The state server can not be reached.

        .. versionadded:: 0.1
        """
        app, policy = self._get_app(), self._policy()
        key = policy.key(args, kwargs)
        if key is None:
            return 0
        engine = engine_of(app)
        cleared = engine.coalescer.clear(policy.scope, key, str(self.name))
        publish_all(app, engine.coalescer, cleared.sent)
        for run in cleared.told_here:
            tell_cleared(app, engine.coalescer, run, engine.producer_bus)
        return cleared.count
