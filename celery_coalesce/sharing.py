"""``share``: of callers that want the same value at the same time one works it out, across processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

from .endings import Ending
from .engine import engine_of
from .errors import StoreUnavailable
from .keys import state_id
from .places import Place, plain_policy, release
from .plain import SHARE, answer_in, caller
from .plain_presence import join
from .reentrancy import check_free, holding
from .states import Disposition, Mode, Outcome

if TYPE_CHECKING:
    from celery import Celery

    from .engine import Engine
    from .presence import ProcessPresence
    from .records import Lease

__all__ = ["share"]

Value = TypeVar("Value")


def share(app: Celery, scope: str, key: str, fn: Callable[[], Value], timeout: float | None) -> Value:
    """Do what :meth:`celery_coalesce.Coalescer.share` says."""
    state = state_id(scope, key)
    check_free(app, state, key)
    engine, presence = engine_of(app), join(app)
    lease: Lease | None = None
    try:
        place = Place(engine, presence, plain_policy(engine, SHARE, scope, Mode.SKIP), key, timeout=timeout)
        while lease is None:
            call = uuid4().hex
            if place.take(caller(app, call, timeout)) is Disposition.SKIPPED:
                shared: Value = _joined(engine, place, call)
                return shared
            lease = place.wait()
    finally:
        if lease is None:
            presence.leave()
    return _led(engine, presence, lease, fn)


def _joined(engine: Engine, place: Place, call: str) -> Any:
    """Wait for the answer of the call that was joined."""
    while (left := place.left()) > 0:
        try:
            blob = engine.transitions.await_answer(call, left)
        except StoreUnavailable:
            place.given_up.wait(left)
            continue
        if blob is not None:
            return answer_in(engine, blob)
    raise place.too_late()


def _led(engine: Engine, presence: ProcessPresence, lease: Lease, fn: Callable[[], Value]) -> Value:
    """Work the value out, and give it to all who have joined."""
    ending = Ending(Outcome.SKIPPED)
    try:
        with holding(lease.state):
            value = fn()
        ending = Ending(Outcome.SUCCEEDED, value=value)
    except BaseException as error:
        ending = Ending.failed(error)
        raise
    finally:
        release(engine, presence, lease, ending)
    return value
