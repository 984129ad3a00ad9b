"""``hold``: a key's slot for plain code.

A hold is a run without a message. Its caller waits until whoever ends the run before it says that its turn has come,
and takes the lease itself; the lease hangs from the presence of its process, however many it holds.
"""

from __future__ import annotations

import asyncio
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING, Any

from .endings import Ending, end_run
from .engine import engine_of
from .errors import CoalesceError, LeaseLost
from .keys import state_id
from .places import Place, plain_policy, release
from .plain import HOLD
from .plain_presence import join
from .policy import Policy
from .reentrancy import check_free, holding
from .states import Mode, Outcome

if TYPE_CHECKING:
    from types import TracebackType

    from celery import Celery

    from .engine import Engine
    from .presence import ProcessPresence
    from .records import Lease

__all__ = ["HeldLease", "Hold", "checked_timeout", "scope_of"]


def checked_timeout(timeout: float | None) -> float | None:
    """Return how long to wait, in seconds.

    Raises:
        ValueError: It is no number of seconds from 0 on, and not ``None``.
    """
    if timeout is None:
        return None
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout >= 0:
        raise ValueError(
            f"timeout={timeout!r} is no number of seconds from 0 on; give one, or None to wait without end"
        )
    return float(timeout)


def scope_of(scope: Any) -> str:
    """Return the name of a scope, given as such or as a task of it.

    Raises:
        ValueError: It is neither.
    """
    policy = None if isinstance(scope, str) else getattr(scope, "coalesce_policy", None)
    name = policy.scope if isinstance(policy, Policy) else scope
    if not isinstance(name, str) or not name:
        raise ValueError(f"scope={scope!r} is neither a coalesced task nor the name of a scope; give one of these")
    return name


class HeldLease:
    """A key that is held: what ``with coalescer.hold(...) as lease`` gives.

    Attributes:
        key: The key.
        token: The fencing token, which grows with every lease of the key: hand it to whatever can refuse an older one.

    .. versionadded:: 0.1
    """

    def __init__(self, engine: Engine, lease: Lease) -> None:
        self._engine = engine
        self._lease = lease
        self.key = lease.key
        self.token = int(lease.token)

    def __repr__(self) -> str:
        return f"<HeldLease {self.key!r}, token {self.token}>"

    def check(self) -> None:
        """Ask whether the key is still held.

        Call it before anything that must not be done by two at once, if the process may have been suspended or cut off
        from the state server for longer than ``coalesce_lease``.

        Raises:
            LeaseLost: It is not: the key may have gone on.
            StoreUnavailable: The state server can not be asked.

        .. versionadded:: 0.1
        """
        if not self._engine.transitions.check(self._lease):
            raise LeaseLost(f"key {self.key!r} is not held any more (token {self.token})")


class Hold:
    """A key's slot, taken for a ``with`` or ``async with`` block. Made by :meth:`celery_coalesce.Coalescer.hold`.

    One object is one hold at a time; it can be used again once it was left.

    .. versionadded:: 0.1
    """

    def __init__(self, app: Celery, scope: str, key: str, timeout: float | None) -> None:
        self._app = app
        self._scope = scope
        self._key = key
        self._state = state_id(scope, key)
        self._timeout = timeout
        self._entry: _Entry | None = None

    def __enter__(self) -> HeldLease:
        """Wait for the key.

        Raises:
            HoldTimeout: It was not free in time.
            NotReentrant: This code has it already.
            StoreUnavailable: The state server can not be reached.
        """
        entry = self._begun()
        try:
            entry.acquire()
        except BaseException:
            self._entry = None
            raise
        return entry.held()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the key back."""
        entry = self._left()
        if entry is not None:
            entry.release()

    async def __aenter__(self) -> HeldLease:
        """Wait for the key, without blocking the event loop.

        Raises:
            HoldTimeout: It was not free in time.
            NotReentrant: This code has it already.
            StoreUnavailable: The state server can not be reached.
        """
        entry = self._begun()
        # A thread of its own, until the key is held: those of the loop's executor are few, and a waiter that took the
        # last of them would keep the holder from giving the key back.
        executor = ThreadPoolExecutor(1, "celery-coalesce-hold")
        try:
            await asyncio.get_running_loop().run_in_executor(executor, entry.acquire)
        except BaseException:
            self._entry = None
            entry.give_up()
            raise
        finally:
            executor.shutdown(wait=False)
        return entry.held()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Give the key back, without blocking the event loop."""
        entry = self._left()
        if entry is not None:
            await asyncio.to_thread(entry.release)

    def _begun(self) -> _Entry:
        check_free(self._app, self._state, self._key)
        if self._entry is not None:
            raise CoalesceError(
                f"this hold of key {self._key!r} is entered already; make another with coalescer.hold()"
            )
        self._entry = _Entry(self._app, self._scope, self._key, self._timeout)
        return self._entry

    def _left(self) -> _Entry | None:
        entry, self._entry = self._entry, None
        if entry is not None:
            entry.mine.__exit__()
        return entry


class _Entry:
    """One pass through a hold. Acquired in one thread, and perhaps given up by another while it waits."""

    def __init__(self, app: Celery, scope: str, key: str, timeout: float | None) -> None:
        self._app = app
        self._engine = engine_of(app)
        self._policy = plain_policy(self._engine, HOLD, scope, Mode.SERIALIZE)
        self._key = key
        self._timeout = timeout
        self._pid = os.getpid()
        self._presence: ProcessPresence | None = None
        self._lease: Lease | None = None
        self._given_up = threading.Event()
        self._handing_over = threading.Lock()
        self.mine = holding(state_id(scope, key))

    def acquire(self) -> None:
        presence = join(self._app)
        timeout, given_up = self._timeout, self._given_up
        place = Place(self._engine, presence, self._policy, self._key, timeout=timeout, given_up=given_up)
        lease: Lease | None = None
        try:
            while lease is None:
                place.take()
                lease = place.wait()
        finally:
            if lease is None:
                presence.leave()
        with self._handing_over:
            self._presence = presence
            if not self._given_up.is_set():
                self._lease = lease
                return
        release(self._engine, presence, lease, Ending(Outcome.SKIPPED))

    def give_up(self) -> None:
        """Let go of the key, whether it is held by now or not. Does not block."""
        with self._handing_over:
            self._given_up.set()
            lease, self._lease = self._lease, None
        if lease is not None and self._presence is not None:
            end = partial(end_run, self._engine, lease, Ending(Outcome.SKIPPED), self._presence.bus())
            self._presence.report_later(end)
            self._presence.leave()

    def held(self) -> HeldLease:
        """Return the lease to the code that has waited for it."""
        if self._lease is None:
            raise CoalesceError(f"key {self._key!r} is not held")
        self.mine.__enter__()
        return HeldLease(self._engine, self._lease)

    def release(self) -> None:
        lease, self._lease = self._lease, None
        # A process that was forked within the block does not hold what its parent does.
        if lease is not None and self._presence is not None and self._pid == os.getpid():
            release(self._engine, self._presence, lease, Ending(Outcome.SUCCEEDED))
