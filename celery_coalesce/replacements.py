"""The task that completes a run's followers when the run was replaced by something of another kind."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from celery import current_app, shared_task

from .calls import decode
from .endings import Ending, tell_caller
from .states import Outcome

if TYPE_CHECKING:
    from celery import Celery
    from celery.canvas import Signature

__all__ = ["complete_with"]

COMPLETE = "celery_coalesce.complete"
FAIL = "celery_coalesce.fail"


@shared_task(name=COMPLETE, ignore_result=True)
def complete(value: Any, followers: list[str]) -> None:
    """Complete followers with a replacement's value."""
    _tell(followers, Ending(Outcome.SUCCEEDED, value=value))


@shared_task(name=FAIL, ignore_result=True)
def fail(request: Any, error: BaseException, traceback: Any, followers: list[str]) -> None:
    """Complete followers with a replacement's failure. An errback of three arguments, which Celery calls in place."""
    _tell(followers, Ending.failed(error, str(traceback) if traceback else None))


def complete_with(app: Celery, sig: Signature, followers: Sequence[bytes]) -> None:
    """Have a signature complete followers when it ends."""
    blobs = [b64encode(blob).decode("ascii") for blob in followers]
    sig.link(app.signature(COMPLETE, kwargs={"followers": blobs}))
    sig.link_error(app.signature(FAIL, kwargs={"followers": blobs}))


def _tell(followers: list[str], ending: Ending) -> None:
    app = current_app._get_current_object()
    for blob in followers:
        follower = decode(app, b64decode(blob))
        tell_caller(app, follower["task"], follower["task_id"], follower, ending)
