"""A place in a key's line: how plain code waits for its turn, and gives the key back."""

from __future__ import annotations

import logging
import threading
import time
from functools import partial
from typing import TYPE_CHECKING

from celery.utils import uuid

from .dispatch import publish_all
from .endings import Ending, end_run, take_back, tell_cleared
from .errors import CoalesceError, HoldTimeout, StoreUnavailable
from .keys import Parameters, state_id
from .plain import PATIENCE
from .policy import Policy
from .records import Accepted, Envelope, Lease, Trigger
from .states import Answer, Disposition, Mode, Outcome, Overflow, Rule
from .transitions import new_nonce
from .views import RunMeta

if TYPE_CHECKING:
    from .engine import Engine
    from .presence import ProcessPresence

__all__ = ["Place", "plain_policy", "release"]

logger = logging.getLogger("celery_coalesce")

#: For how many seconds at most a waiter relies on being told: then it asks.
ASK_AGAIN = 1.0
#: Answers after which the place is gone: the key was cleared, the store has lost it, or it was not taken in time.
PLACE_LOST = (Answer.GONE, Answer.UNKNOWN, Answer.DUPLICATE)

_NO_PARAMETERS = Parameters(lambda: None, bound=False)


def plain_policy(engine: Engine, task: str, scope: str, mode: Mode) -> Policy:
    """Return the options of a run of plain code: those that the tasks of its scope agree on.

    Args:
        engine: The app's engine.
        task: What stands for the task.
        scope: The scope.
        mode: What a trigger does while its key is busy.
    """
    return Policy(
        task=task,
        scope=scope,
        parameters=_NO_PARAMETERS,
        key_of=None,
        mode=mode,
        max_queued=1,
        overflow=Overflow.MERGE,
        rule=Rule.LATEST,
        merge=None,
        limit=1 if mode is Mode.SKIP else engine.least_limit(scope),
        cooldown=engine.longest_rest(scope),
    )


class Place:
    """A place in a key's line, from the trigger to the lease.

    Args:
        engine: The app's engine.
        presence: The presence that the lease will hang from.
        policy: The options of the run.
        key: The key.
        timeout: For how many seconds to wait; ``None``: without end.
        given_up: Set by who wants the waiting to end.
    """

    def __init__(
        self,
        engine: Engine,
        presence: ProcessPresence,
        policy: Policy,
        key: str,
        *,
        timeout: float | None,
        given_up: threading.Event | None = None,
    ) -> None:
        self.key = key
        self.state = state_id(policy.scope, key)
        self._engine = engine
        self._presence = presence
        self._policy = policy
        self._timeout = timeout
        self._until = None if timeout is None else time.monotonic() + timeout
        self._envelope: Envelope | None = None
        self._claim = ""
        self.given_up = given_up or threading.Event()

    def left(self) -> float:
        """Return the seconds until it is time to ask again, or to give up."""
        return ASK_AGAIN if self._until is None else min(self._until - time.monotonic(), ASK_AGAIN)

    def too_late(self) -> HoldTimeout:
        """Return what to raise when the time is over."""
        return HoldTimeout(self.key, self._timeout or 0.0)

    def take(self, follower: bytes = b"") -> Disposition:
        """Come into the line, or join the run that is there.

        Args:
            follower: What tells a run that is joined whom to answer.

        Raises:
            StoreUnavailable: The state server can not be reached.
        """
        trigger = Trigger(uuid(), self.key, b"", follower=follower, store=False, patience=PATIENCE)
        accepted = self._engine.transitions.trigger(self._policy, trigger)
        if not isinstance(accepted, Accepted):
            raise CoalesceError(f"{self._policy.task}: the state server gave no answer to a trigger: {accepted!r}")
        publish_all(self._engine, accepted.sent)
        if accepted.disposition is not Disposition.SKIPPED:
            self._claim = new_nonce()
            task = self._policy.task
            self._envelope = Envelope(self.state, accepted.run, accepted.task_id, task, 0, 0, 0, b"", b"")
        return accepted.disposition

    def wait(self) -> Lease | None:
        """Wait until the turn has come; return the lease, or ``None`` if the place is lost.

        Raises:
            HoldTimeout: It has not come in time. The place is given up.
            StoreUnavailable: The state server could not be reached until the time was over.
        """
        try:
            while True:
                answer, lease, wait = self._ask()
                if lease is not None or answer in PLACE_LOST:
                    return lease
                if self.given_up.is_set() or self.left() <= 0:
                    raise self.too_late()
                self._pause(min(wait, self.left()))
        except BaseException as error:
            self._give_up(error)
            raise

    def _ask(self) -> tuple[Answer | None, Lease | None, float]:
        """Ask for the lease; return the answer, and for how many seconds not to ask again."""
        if self._envelope is None:
            raise CoalesceError(f"key {self.key!r} was waited for without a place in its line")
        try:
            started = self._engine.transitions.start(
                self._envelope, owner=self._presence.owner, claim=self._claim, late=False, revoked=False
            )
        except StoreUnavailable:
            if self.left() <= 0:
                raise
            return None, None, ASK_AGAIN
        publish_all(self._engine, started.sent)
        return started.answer, started.lease, started.wait / 1000 if started.answer is Answer.EARLY else ASK_AGAIN

    def _pause(self, seconds: float) -> None:
        try:
            if self._envelope is not None:
                self._engine.transitions.await_turn(self._envelope.run, seconds)
        except StoreUnavailable:
            self.given_up.wait(seconds)

    def _give_up(self, error: BaseException) -> None:
        ending = Ending(Outcome.SKIPPED, error=error)
        try:
            self._leave(ending)
        except CoalesceError:
            self._presence.report_later(partial(self._leave, ending))

    def _leave(self, ending: Ending) -> None:
        """Take the place back, whatever has become of it meanwhile. Safe to repeat."""
        if self._envelope is None:
            return
        transitions = self._engine.transitions
        run = RunMeta.unstarted(self._policy, self.key, self._envelope)
        take_back(self._engine, run, self._presence.bus())
        # The answer to the last question may have been lost, and a run that others have joined is not taken back.
        started = transitions.start(
            self._envelope, owner=self._presence.owner, claim=self._claim, late=False, revoked=False
        )
        publish_all(self._engine, started.sent)
        if started.lease is not None:
            end_run(self._engine, started.lease, ending, self._presence.bus())
        elif started.answer not in PLACE_LOST:
            publish_all(
                self._engine, transitions.withdraw(self._envelope, f"its caller has given up: {ending.error!r}")
            )
            woken = transitions.wake(f"{self.state}/{self._envelope.run}")
            publish_all(self._engine, woken.sent)
            if woken.cleared is not None:
                tell_cleared(self._engine, woken.cleared, self._presence.bus())


def release(engine: Engine, presence: ProcessPresence, lease: Lease, ending: Ending) -> None:
    """End a run of plain code, and pass its slot on. What can not be done now the presence does."""
    end = partial(end_run, engine, lease, ending, presence.bus())
    try:
        if not end():
            logger.warning(
                "The lease of key %r was lost before it was given back",
                lease.key,
                extra={"action": "lease_lost", "run_id": lease.run, "task_id": lease.task_id},
            )
    except CoalesceError as error:
        logger.warning(
            "Key %r could not be given back yet: %s",
            lease.key,
            error,
            extra={"action": "report_delayed", "run_id": lease.run},
        )
        presence.report_later(end)
    except BaseException:
        # Interrupted: it may or may not have come through, and is safe to repeat.
        presence.report_later(end)
        raise
    finally:
        presence.leave()
