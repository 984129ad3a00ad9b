"""The task that completes a run's followers when the run was replaced by something of another kind."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery import Task, current_app, shared_task
from celery.app.task import Context
from celery.canvas import maybe_signature

from .endings import Ending, tell_follower
from .signals import EventBus
from .states import Outcome

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature

__all__ = ["complete_followers", "complete_with"]

COMPLETE = "celery_coalesce.complete"
FAIL = "celery_coalesce.fail"


@shared_task(name=COMPLETE, bind=True, ignore_result=True)
def complete(self: Task, value: Any, followers: list[str], monitored: bool) -> None:
    """Complete followers with a replacement's value."""
    bus = EventBus(self.app, monitored, self.request.hostname)
    _tell(bus, followers, Ending(Outcome.SUCCEEDED, value=value))


@shared_task(name=FAIL, ignore_result=True)
def fail(request: Context, error: BaseException, traceback: Any, followers: list[str], monitored: bool) -> None:
    """Complete followers with a replacement's failure. An errback of three arguments, which Celery calls in place."""
    bus = EventBus(current_app._get_current_object(), monitored, request.hostname)
    _tell(bus, followers, Ending.failed(error, str(traceback) if traceback else None))


def complete_with(bus: EventBus, sig: Signature, followers: Sequence[bytes]) -> None:
    """Have a signature complete followers when it ends."""
    given = {
        "followers": [b64encode(blob).decode("ascii") for blob in followers],
        "monitored": bus.enabled,
    }
    sig.link(bus.app.signature(COMPLETE, kwargs=given))
    sig.link_error(bus.app.signature(FAIL, kwargs=given))


def complete_followers(app: Celery, links: Sequence[Any], value: Any) -> None:
    """Call those of a task's links that complete followers."""
    for link in links:
        if link.get("task") == COMPLETE:
            maybe_signature(link, app=app).apply_async((value,))


def _tell(bus: EventBus, followers: list[str], ending: Ending) -> None:
    for blob in followers:
        tell_follower(bus, b64decode(blob), ending)
