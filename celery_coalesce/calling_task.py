"""What producers use of a coalesced task: ``apply_async`` and its kin."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from celery import Task

from .calling import Call, ExemptCall
from .calls import HEADER
from .making import make_calls
from .terms import Terms

if TYPE_CHECKING:
    from .errors import OptionError
    from .policy import Policy
    from .result import CoalescedResult
    from .terms import Arguments

__all__ = ["CallingTask"]

Options = dict[str, Any]


class CallingTask(Task):
    """The calling half of :class:`~celery_coalesce.CoalescedTask`."""

    coalesce_policy: Policy | None
    coalesce_refused: OptionError | None

    # -- one call ----------------------------------------------------------------------------------------------------

    def apply_async(  # noqa: PLR0917 - Celery's own signature
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
            options: Celery's options, and ``coalesce``, ``coalesce_key`` (``None``: this call is exempt),
                ``coalesce_args``, ``coalesce_max_queued``, ``coalesce_overflow``, ``coalesce_delay`` and
                ``coalesce_max_delay`` for this call alone.

        Returns:
            A :class:`~celery_coalesce.CoalescedResult` (an ``EagerResult`` under ``task_always_eager``).

        Raises:
            InvalidKey: The key is not a non-empty string.
            OptionError: A per-call option is unknown or bad.
            QueueFull: ``coalesce_overflow="reject"``, and enough runs wait.
            StoreUnavailable: The state server can not be reached, and ``coalesce_on_outage`` is ``"raise"``.
            TypeError: The arguments do not fit the task's parameters.
            kombu.exceptions.EncodeError: Arguments or options can not be serialized.
            kombu.exceptions.OperationalError: The broker can not be reached. Nothing is left behind.

        .. versionadded:: 0.1
        """
        own = {"link": link, "link_error": link_error, "shadow": shadow}
        options |= {name: value for name, value in own.items() if value is not None}
        overrides, options = _split(options)
        if task_id is not None and self._continues(task_id, args, kwargs, options):
            return self.AsyncResult(task_id)
        policy = self._calling_policy(overrides)
        if policy is None:
            return super().apply_async(args, kwargs, task_id, producer, **options)
        [call] = self._ready([(args or (), kwargs or {})], policy, overrides, options, task_id)
        [result] = make_calls(self, [call], producer)
        return result.raise_if_refused()

    # -- many calls --------------------------------------------------------------------------------------------------

    def batch_delay(self, calls: Iterable[Sequence[Any]]) -> list[CoalescedResult]:
        """Make many calls in few round trips, as ``delay`` makes one.

        ::

            process.batch_delay([(7,), (8,), (7,)])

        Args:
            calls: The positional arguments of each call.

        Returns:
            Their results, in their order; see :meth:`batch_apply_async`.

        Raises:
            TypeError: An element is no list or tuple, or does not fit the task's parameters.
            Exception: See :meth:`batch_apply_async`.

        .. versionadded:: 0.1
        """
        listed = list(calls)
        for position, args in enumerate(listed):
            if not isinstance(args, list | tuple):
                raise TypeError(
                    f"{self.name}: call {position} of batch_delay is {args!r}; give each call's arguments as a tuple, "
                    f"({args!r},)"
                )
        return self.batch_apply_async([(args, {}) for args in listed])

    def batch_apply_async(
        self,
        calls: Iterable[tuple[Sequence[Any] | None, Mapping[str, Any] | None]],
        *,
        producer: Any = None,
        **options: Any,
    ) -> list[CoalescedResult]:
        """Make many calls in few round trips, as ``apply_async`` makes one.

        All of them are validated before anything happens: if one is invalid, nothing is stored, published or
        reported. Then all triggers are accepted, in their order; then the messages of new runs are published, over one
        connection. An exempt call is published like a plain Celery call.

        Args:
            calls: Positional and keyword arguments of each call.
            producer: A kombu producer to publish with.
            options: What else :meth:`apply_async` takes, except ``task_id``; the same for every call.

        Returns:
            Their results, in their order (``EagerResult`` under ``task_always_eager``); calls that join a run have one
            in common. A call that is rejected (``coalesce_overflow="reject"``) raises nothing here: its result has
            that disposition, and its ``get()`` raises ``QueueFull``.

        Raises:
            InvalidKey: A key is not a non-empty string.
            OptionError: A per-call option is unknown or bad.
            StoreUnavailable: The state server can not be reached, and ``coalesce_on_outage`` is ``"raise"``. Calls
                before may have been accepted: their runs are published.
            TypeError: An element is no pair, arguments do not fit the task's parameters, or ``task_id`` was given.
            kombu.exceptions.EncodeError: Arguments can not be serialized.
            kombu.exceptions.OperationalError: The broker can not be reached. Runs that were not published are taken
                back, unless others have joined them; calls that joined runs of others stay accepted.

        .. versionadded:: 0.1
        """
        if options.get("task_id") is not None:
            raise TypeError(
                f"{self.name}: batch_apply_async takes no task_id, got {options['task_id']!r}: one id can not name "
                "several calls; make those calls with apply_async"
            )
        listed = [self._pair(position, call) for position, call in enumerate(calls)]
        overrides, options = _split({name: value for name, value in options.items() if name != "task_id"})
        policy = self._calling_policy(overrides)
        if policy is None:
            for args, kwargs in listed:
                self._check_header(args, kwargs)
            plain = super().apply_async
            return [plain(args, kwargs, producer=producer, **options) for args, kwargs in listed]
        return make_calls(self, self._ready(listed, policy, overrides, options), producer)

    def _pair(self, position: int, call: Any) -> Arguments:
        """Return positional and keyword arguments of a call of a batch."""
        if isinstance(call, list | tuple) and len(call) == 2:  # noqa: PLR2004 - a pair
            args, kwargs = call
            if isinstance(args, list | tuple | None) and isinstance(kwargs, Mapping | None):
                return args or (), kwargs or {}
        raise TypeError(
            f"{self.name}: call {position} of batch_apply_async is {call!r}; give each call as a pair of positional "
            "and keyword arguments, ((7,), {})"
        )

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

    # -- making a call ready -----------------------------------------------------------------------------------------

    def _calling_policy(self, overrides: Options) -> Policy | None:
        """Return the task's options as calls override them; ``None`` if calls of it are plain ones, or run inline."""
        if self.coalesce_refused is not None:
            raise self.coalesce_refused
        if self.coalesce_policy is None:
            return None
        policy = self.coalesce_policy
        if overrides:
            policy = policy.override({n: v for n, v in overrides.items() if n != "coalesce_key"})
        return None if self._get_app().conf.task_always_eager else policy

    def _check_header(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        """Refuse arguments that do not fit, as ``Task.apply_async`` does."""
        # A task that was written as a class has no header to check against.
        header = getattr(self, "__header__", None)
        if self.typing and header is not None:
            header(*args, **kwargs)

    def _ready(
        self,
        calls: Sequence[Arguments],
        policy: Policy,
        overrides: Options,
        options: Options,
        task_id: str | None = None,
    ) -> list[Call | ExemptCall]:
        """Return calls that can be made, or refuse them all.

        Args:
            calls: Positional and keyword arguments of each.
            policy: The task's options, as the calls override them.
            overrides: Their coalesce options.
            options: Their others.
            task_id: The id of a single call that brings one.
        """
        plain = super().apply_async
        terms: Terms | None = None
        ready: list[Call | ExemptCall] = []
        for args, kwargs in calls:
            self._check_header(args, kwargs)
            key = self._key(policy, args, kwargs, overrides, options)
            if key is None:
                ready.append(ExemptCall(self, partial(plain, args, kwargs), (args, kwargs), options, task_id))
                continue
            # Not before it is needed: exempt calls do without a state server.
            terms = terms or Terms(self, policy, plain, options)
            ready.append(Call(terms, key, (args, kwargs), task_id))
        return ready

    def _key(
        self,
        policy: Policy,
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        overrides: Mapping[str, Any],
        options: Mapping[str, Any],
    ) -> str | None:
        """Return the call's key, ``None`` if it is exempt."""
        header = (options.get("headers") or {}).get(HEADER)
        if isinstance(header, dict) and header.get("exempt") is True:
            # The retry of an exempt call is exempt.
            return None
        return policy.key_of_call(args, kwargs, overrides)

    def _continues(
        self,
        task_id: str,
        args: Sequence[Any] | None,
        kwargs: Mapping[str, Any] | None,
        options: Mapping[str, Any],
    ) -> bool:
        """Return whether a call is the next attempt of a run, which is sent once this one has ended."""
        raise NotImplementedError


def _split(options: Options) -> tuple[Options, Options]:
    """Return the coalesce options of a call, and its others."""
    ours = {name: value for name, value in options.items() if name == "coalesce" or name.startswith("coalesce_")}
    if not ours:
        return ours, options
    return ours, {name: value for name, value in options.items() if name not in ours}
