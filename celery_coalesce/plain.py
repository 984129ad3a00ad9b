"""Runs of plain code: no task, no message, no result.

They stand in the record as every run does, under the name of a task that is not there. Where another run gets a
message, their caller, who waits, is told that its turn has come; and where another run's follower gets a result, theirs
gets an answer.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

from kombu.exceptions import EncodeError
from kombu.utils.encoding import safe_repr

from .calls import decode, encode
from .errors import CoalesceError, StoreUnavailable

if TYPE_CHECKING:
    from celery import Celery

    from .engine import Engine
    from .records import Envelope

__all__ = ["HOLD", "PATIENCE", "PLAIN", "SHARE", "answer", "answer_in", "caller", "give_turn"]

logger = logging.getLogger("celery_coalesce")

#: The tasks that these runs name.
HOLD, SHARE = "celery_coalesce.hold", "celery_coalesce.share"
PLAIN = frozenset({HOLD, SHARE})

#: Milliseconds within which whoever waits takes the slot that it got; after that it is taken for dead.
PATIENCE = 5_000
#: An answer is kept for as long as its caller waits, and no longer than this, in milliseconds.
ANSWER_KEPT = 60_000


def give_turn(engine: Engine, envelope: Envelope) -> None:
    """Tell whoever waits for a run that its turn has come. It asks by itself now and then, if this is lost."""
    try:
        engine.transitions.hand_turn(envelope.run, PATIENCE)
    except CoalesceError:
        logger.warning(
            "Whoever waits for run %s could not be told that its turn has come",
            envelope.run,
            extra={"action": "turn_untold", "run_id": envelope.run},
        )


def caller(app: Celery, call: str, timeout: float | None) -> bytes:
    """Return what tells the run that a call of ``share`` has joined whom to answer.

    Args:
        app: The app.
        call: The call's id.
        timeout: For how many seconds the caller waits.
    """
    kept = ANSWER_KEPT if timeout is None else min(math.ceil(timeout * 1000), ANSWER_KEPT)
    return encode({"task_id": call, "kept": kept}, app.conf.task_serializer)


def answer(engine: Engine, blob: bytes, value: Any, error: BaseException | None) -> None:
    """Give a caller of ``share`` the value, or the exception, of the call that it has joined.

    Raises:
        StoreUnavailable: It has not got it; call again.
    """
    try:
        follower = decode(engine.app, blob)
        told = _told(engine.app.backend, value, error)
        engine.transitions.hand_answer(follower["task_id"], told, follower["kept"])
    except StoreUnavailable:
        raise
    except Exception:
        logger.exception("A caller could not be given the shared value", extra={"action": "answer_failed"})


def _told(backend: Any, value: Any, error: BaseException | None) -> bytes:
    if error is None:
        try:
            return _bytes(backend.encode({"value": value}))
        except Exception as reason:
            error = EncodeError(
                f"the shared value is a {type(value).__qualname__}, which the result serializer {backend.serializer!r} "
                f"can not take ({safe_repr(reason)}); return something that it can, or set result_serializer"
            )
    return _bytes(backend.encode({"error": backend.prepare_exception(error)}))


def answer_in(engine: Engine, blob: bytes) -> Any:
    """Return the value of an answer.

    Raises:
        BaseException: The exception that it holds instead.
    """
    backend = engine.app.backend
    binary = backend.content_encoding == "binary"
    told = backend.decode(blob if binary else blob.decode())
    if "error" in told:
        raise backend.exception_to_python(told["error"])
    return told["value"]


def _bytes(payload: str | bytes) -> bytes:
    return payload.encode() if isinstance(payload, str) else payload
