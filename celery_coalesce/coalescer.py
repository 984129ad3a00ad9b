"""The coalescing engine: what a key's record can do, without a word of Celery workers.

Every method is one transition, one round trip, and safe to repeat. What a transition dispatches it returns as
envelopes; publishing them is the caller's, and one that never is will be published by the sweep.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any
from uuid import uuid4

from .keys import state_id
from .policy import Policy
from .records import (
    Accepted,
    Cleared,
    ClearedKey,
    Envelope,
    Finished,
    Followers,
    Known,
    Lease,
    LostLease,
    MergeWanted,
    Overdue,
    RecordView,
    RolledBack,
    RunMeta,
    Started,
    Timing,
    Trigger,
    Woken,
)
from .states import Answer, Disposition, RunState
from .store import Store

__all__ = ["SLICE", "Coalescer"]

#: A second loss of the same run's message within the hour is noticed an hour after the first, in milliseconds.
HOURLY = 3_600_000
#: A publish that is known to have failed is tried again after this many milliseconds.
UNPUBLISHED_AGAIN = 60_000
#: How many overdue things one look at the store returns.
SLICE = 100


def _text(value: Any) -> str:
    return value.decode("utf-8", "surrogatepass") if isinstance(value, bytes) else str(value)


def _blob(value: Any) -> bytes:
    return value if isinstance(value, bytes) else b""


class Coalescer:
    """The engine of one namespace.

    Args:
        store: Where the records are.
        timing: How long things may take.
    """

    def __init__(self, store: Store, timing: Timing) -> None:
        self.store = store
        self.timing = timing

    # -- the producer ------------------------------------------------------------------------------------------------

    def trigger(
        self, policy: Policy, trigger: Trigger, merging: MergeWanted | None = None
    ) -> Accepted | MergeWanted | Known | None:
        """Accept a trigger.

        Args:
            policy: The task's options, as the call overrides them.
            trigger: The call.
            merging: What the trigger's arguments were merged with, if a merge was wanted.

        Returns:
            What became of it; or what a merge function is to be applied to, before the call is made again; or, for a
            message, the run that it was admitted as, or ``None`` if that has ended.
        """
        state = state_id(policy.scope, trigger.key)
        asked: dict[str, Any] = {
            "task_id": trigger.task_id,
            "task": policy.task,
            "mode": policy.mode.value,
            "limit": policy.limit,
            "max_queued": policy.max_queued,
            "overflow": policy.overflow.value,
            "rule": policy.rule.value,
            "scope": policy.scope,
            "store": trigger.store,
            "redispatch": self.timing.redispatch,
            "soon": self.timing.soon,
            **trigger.times,
            "within": trigger.within,
            "watch": trigger.watch or None,
        }
        if merging is not None:
            asked["target"], asked["base"] = merging.run, merging.version
        name = "trigger"
        keys: tuple[str, ...] = self.store.names.record(state)
        if trigger.message is not None:
            name = "admit"
            keys = (*keys, self.store.names.seen)
            asked["message"], asked["remember"] = trigger.message, self.timing.remember
        key = trigger.key.encode("utf-8", "surrogatepass")
        reply = self._call(name, keys, state, asked, key, trigger.args, trigger.call, trigger.follower)
        word = _text(reply[0])
        if word == Answer.MERGE:
            return MergeWanted(_text(reply[1]), int(reply[2]), _blob(reply[3]))
        if word == Answer.KNOWN:
            return Known(_text(reply[1]), _text(reply[2]), int(reply[3]))
        if word == Answer.GONE:
            return None
        delay = int(reply[4])
        return Accepted(
            disposition=Disposition(word),
            run=_text(reply[1]),
            task_id=_text(reply[2]),
            run_state=RunState(_text(reply[3])),
            delay=None if delay < 0 else delay,
            replaced=_blob(reply[5]),
            sent=self._envelopes(state, reply[6]),
        )

    def rollback(self, state: str, run: str, task_id: str) -> RolledBack:
        """Take back a dispatch whose publish failed, unless others have joined the run since."""
        reply = self._record("rollback", state, run, task_id=task_id, again=UNPUBLISHED_AGAIN)
        if _text(reply[0]) != Answer.ENDED:
            return RolledBack()
        session = _text(reply[2])
        return RolledBack(self._envelopes(state, reply[1]), int(session) if session else None, int(reply[3]))

    def unpublished(self, envelope: Envelope) -> None:
        """Note that a run's message was not published; it is tried again in 60 seconds."""
        self._record("unpublished", envelope.state, envelope.run, again=UNPUBLISHED_AGAIN)

    def withdraw(self, envelope: Envelope, why: str) -> tuple[Envelope, ...]:
        """Take out a run whose message can not be made, for the sweep to tell its callers why."""
        reply = self._record("withdraw", envelope.state, envelope.run, why=why)
        return self._envelopes(envelope.state, reply[1]) if _text(reply[0]) == Answer.CLEARED else ()

    # -- the worker --------------------------------------------------------------------------------------------------

    def start(
        self,
        envelope: Envelope,
        *,
        owner: str,
        claim: str,
        late: bool,
        revoked: bool,
    ) -> Started:
        """Ask for a run's lease.

        Args:
            envelope: What the message says of the run.
            owner: The worker process that the lease will hang from.
            claim: This question's own id: repeated, it gets the same answer.
            late: Whether the task is acknowledged late, and so runs again if its worker dies.
            revoked: Whether the worker knows the run to be revoked.
        """
        state = envelope.state
        names = self.store.names
        asked = {
            "run": envelope.run,
            "task_id": envelope.task_id,
            "attempt": envelope.attempt,
            "version": envelope.version,
            "claim": claim,
            "owner": owner,
            "late": late or None,
            "lease": self.timing.lease,
            "revoked": revoked or None,
            "redispatch": self.timing.redispatch,
        }
        keys = (*names.record(state), names.presence, names.held(owner))
        reply = self._call("start", keys, state, asked)
        answer = Answer(_text(reply[0]))
        if answer is Answer.EARLY:
            return Started(answer, wait=int(reply[1]))
        if answer is Answer.CARRY:
            return Started(answer, call=_blob(reply[1]))
        if answer not in (Answer.RUNNING, Answer.EXPIRED, Answer.REVOKED):
            return Started(answer)
        expires = int(reply[6])
        lease = Lease(
            state=state,
            run=envelope.run,
            task_id=envelope.task_id,
            task=envelope.task,
            attempt=envelope.attempt,
            token=_text(reply[1]),
            session=_text(reply[2]),
            index=int(reply[3]),
            triggers=int(reply[4]),
            store=_text(reply[5]) == "1",
            expires=None if expires < 0 else expires,
            key=_text(reply[7]),
            scope=_text(reply[8]),
            mode=_text(reply[9]),
            args=_blob(reply[10]),
            owner=owner,
            answer=answer.value,
        )
        return Started(answer, lease)

    def check(self, lease: Lease, *, returned: bool = False) -> bool:
        """Return whether a lease still holds; note, if asked to, that the body has returned."""
        reply = self._record("check", lease.state, lease.run, token=lease.token, returned=returned or None)
        return _text(reply[0]) == Answer.RUNNING

    def followers(self, lease: Lease) -> list[bytes] | None:
        """Return the followers of a run that nobody can join any more; ``None`` if the lease was lost."""
        found: list[bytes] = []
        while True:
            reply = self._record("check", lease.state, lease.run, token=lease.token, returned=True, after=len(found))
            if _text(reply[0]) != Answer.RUNNING:
                return None
            if len(reply) == 1:
                return found
            found += reply[1:]

    def finish(
        self, lease: Lease, *, told: int = 0, drain: RunMeta | None = None, announced: bool = True
    ) -> Finished | Followers | None:
        """End a run and pass its slot on.

        Args:
            lease: The run's lease.
            told: How many of its followers have been told.
            drain: What the session's drain is announced with, if anybody may listen.
            announced: Whether the caller announces it, and the sweep only if the caller dies.

        Returns:
            Followers that are still to be told, before the call is made again; what was dispatched into the slot; or
            ``None`` if the lease was lost.
        """
        names = self.store.names
        asked = {
            "run": lease.run,
            "token": lease.token,
            "told": told,
            "redispatch": self.timing.redispatch,
            "announce_in": (self.timing.lease if announced else 0) if drain is not None else None,
        }
        keys = (*names.record(lease.state), names.held(lease.owner), names.drains)
        blob = json.dumps(asdict(drain)).encode() if drain is not None else b""
        reply = self._call("finish", keys, lease.state, asked, blob)
        answer = _text(reply[0])
        if answer == Answer.FOLLOWERS:
            return Followers(tuple(reply[1:]))
        if answer == Answer.LOST:
            return None
        drained = _text(reply[1]) == "1"
        return Finished(self._envelopes(lease.state, reply[2]), drained, blob if drained else b"")

    def retry(
        self,
        lease: Lease,
        task: str,
        args: bytes,
        call: bytes,
        *,
        delay: int | None = None,
        due: int | None = None,
    ) -> tuple[Envelope, ...] | None:
        """Keep the slot for the run's next attempt.

        Args:
            lease: This attempt's lease.
            task: The task that makes the next attempt.
            args: Its arguments.
            call: Its call.
            delay: Milliseconds until it is due.
            due: The moment at which it is due, in milliseconds since the epoch.

        Returns:
            What is to be published, or ``None`` if the lease was lost.
        """
        names = self.store.names
        asked = {
            "run": lease.run,
            "token": lease.token,
            "task": task,
            "redispatch": self.timing.redispatch,
            "soon": self.timing.soon,
            "delay": delay,
            "due": due,
        }
        keys = (*names.record(lease.state), names.held(lease.owner))
        reply = self._call("retry", keys, lease.state, asked, args, call)
        if _text(reply[0]) == Answer.LOST:
            return None
        return self._envelopes(lease.state, reply[1])

    def requeue(self, lease: Lease) -> tuple[Envelope, ...] | None:
        """Wait for the message that the broker gives back.

        Returns:
            What to publish if the broker can not be trusted to, or ``None`` if the lease was lost.
        """
        names = self.store.names
        asked = {"run": lease.run, "token": lease.token, "redispatch": self.timing.redispatch}
        keys = (*names.record(lease.state), names.held(lease.owner))
        reply = self._call("requeue", keys, lease.state, asked)
        return self._envelopes(lease.state, reply[1]) if _text(reply[0]) == Answer.DISPATCHED else None

    def carry(self, envelope: Envelope, new_task_id: str, call: bytes) -> tuple[Envelope, ...]:
        """Carry the triggers that had joined a revoked run over to a new run of the key."""
        asked = {
            "run": envelope.run,
            "task_id": envelope.task_id,
            "new_task_id": new_task_id,
            "redispatch": self.timing.redispatch,
        }
        reply = self._call("carry", self.store.names.record(envelope.state), envelope.state, asked, call)
        return self._envelopes(envelope.state, reply[1]) if _text(reply[0]) == Answer.DISPATCHED else ()

    # -- the sweep ---------------------------------------------------------------------------------------------------

    def heartbeat(self, owner: str) -> int | None:
        """Renew a presence; return the milliseconds until something is overdue, ``None`` if nothing is in sight."""
        reply = self._plain("heartbeat", self._indexes, owner=owner, lease=self.timing.lease)
        wait = int(reply[1])
        return None if wait < 0 else wait

    def overdue(self) -> Overdue:
        """Return what nobody has moved on in time."""
        _, processes, refs, drains = self._plain("overdue", self._indexes, most=SLICE)
        return Overdue(tuple(map(_text, processes)), tuple(map(_text, refs)), tuple(map(_blob, drains)))

    def held(self, owner: str) -> list[str]:
        """Return some of the leases that hang from a process."""
        return self.store.members(self.store.names.held(owner), SLICE)

    def bury(self, owner: str, *, leaving: bool = False) -> None:
        """Forget a presence that holds nothing."""
        names = self.store.names
        self._plain("bury", (names.presence, names.held(owner)), owner=owner, leaving=leaving or None)

    def lose(self, ref: str, owner: str, sweeper: str) -> LostLease | None:
        """Take a lease from a process whose presence ran out; ``None`` if there is none to take."""
        state, run = ref.split("/")
        names = self.store.names
        asked = {
            "run": run,
            "owner": owner,
            "sweeper": sweeper,
            "lease": self.timing.lease,
            "redispatch": self.timing.redispatch,
        }
        keys = (*names.record(state), names.presence, names.held(owner), names.held(sweeper))
        reply = self._call("lose", keys, state, asked)
        answer = _text(reply[0])
        if answer not in (Answer.DISPATCHED, Answer.LOST):
            return None
        lease = Lease(
            state=state,
            run=run,
            token=_text(reply[2]),
            session=_text(reply[3]),
            index=int(reply[4]),
            attempt=int(reply[5]),
            triggers=int(reply[6]),
            key=_text(reply[7]),
            scope=_text(reply[8]),
            task_id=_text(reply[9]),
            task=_text(reply[10]),
            owner=sweeper,
        )
        if answer == Answer.DISPATCHED:
            return LostLease(lease, b"", self._envelopes(state, reply[1]))
        return LostLease(lease, _blob(reply[11]), ())

    def wake(self, ref: str) -> Woken:
        """Move on a run whose timer is over."""
        state, run = ref.split("/")
        reply = self._record("wake", state, run, hourly=HOURLY, lease=self.timing.lease)
        answer = _text(reply[0])
        if answer == Answer.DISPATCHED:
            return Woken(self._envelopes(state, reply[1]), _text(reply[2]))
        if answer == Answer.CLEARED:
            return Woken(cleared=self._cleared(state, [run, *reply[1:]]))
        return Woken()

    def take_drain(self, blob: bytes) -> RunMeta | None:
        """Take a recorded drain out of the store, to announce it; ``None`` if another process has."""
        if not self.store.take(self.store.names.drains, blob):
            return None
        return RunMeta(**json.loads(blob))

    # -- the operator ------------------------------------------------------------------------------------------------

    def clear(self, scope: str, key: str, task: str | None = None) -> ClearedKey:
        """Take what has not started out of a key's queue.

        Args:
            scope: The key's scope.
            key: The key.
            task: Only this task's runs; ``None`` for all of the scope.
        """
        state = state_id(scope, key)
        count = 0
        told_here: list[Cleared] = []
        sent: list[Envelope] = []
        cursor, bound = "0", None
        while True:
            asked = {
                "cursor": cursor,
                "bound": bound,
                "task": task or "",
                "lease": self.timing.lease,
                "redispatch": self.timing.redispatch,
            }
            reply = self._call("clear", self.store.names.record(state), state, asked)
            cursor, bound = _text(reply[1]), _text(reply[2])
            count += int(reply[3])
            sent += self._envelopes(state, reply[4])
            told_here += [self._cleared(state, run) for run in reply[5]]
            if cursor == "0":
                return ClearedKey(count, tuple(told_here), tuple(sent))

    def show(self, scope: str, key: str) -> RecordView | None:
        """Return a key's record, ``None`` if the key is idle."""
        state = state_id(scope, key)
        reply = self._call("show", self.store.names.record(state), state, {})
        if _text(reply[0]) == Answer.IDLE:
            return None
        view = json.loads(reply[2])
        return RecordView(_text(reply[1]), view["head"], tuple(view["runs"] or ()), int(view["now"]))

    # -- calling -----------------------------------------------------------------------------------------------------

    @property
    def _indexes(self) -> tuple[str, ...]:
        names = self.store.names
        return (names.meta, names.presence, names.timers, names.drains)

    def _call(self, script: str, keys: Sequence[str], state: str, asked: Mapping[str, Any], *blobs: bytes) -> list[Any]:
        given = {name: value for name, value in asked.items() if value is not None}
        # The nonce is the call's own: repeated because its reply was lost, the call is known again.
        question = {"state": state, "nonce": uuid4().hex[:12], **given}
        return self.store.call(script, keys, json.dumps(question), *blobs)

    def _record(self, script: str, state: str, run: str, **asked: Any) -> list[Any]:
        asked = {"run": run, "redispatch": self.timing.redispatch, **asked}
        return self._call(script, self.store.names.record(state), state, asked)

    def _plain(self, script: str, keys: Sequence[str], **asked: Any) -> list[Any]:
        given = {name: value for name, value in asked.items() if value is not None}
        return self.store.call(script, keys, json.dumps(given))

    def _envelopes(self, state: str, replies: Sequence[Sequence[Any]]) -> tuple[Envelope, ...]:
        return tuple(
            Envelope(
                state=state,
                run=_text(run),
                task_id=_text(task_id),
                task=_text(task),
                attempt=int(attempt),
                version=int(version),
                delay=int(delay),
                args=_blob(args),
                call=_blob(call),
            )
            for run, task_id, task, attempt, version, delay, args, call in replies
        )

    def _cleared(self, state: str, run: Sequence[Any]) -> Cleared:
        run_id, token, task_id, task, call, session, triggers, key, scope, received, why = run
        lease = Lease(
            state=state,
            run=_text(run_id),
            token=_text(token),
            task_id=_text(task_id),
            task=_text(task),
            attempt=0,
            session=_text(session),
            index=0,
            triggers=int(triggers),
            key=_text(key),
            scope=_text(scope),
            owner="",
        )
        return Cleared(lease, _blob(call), _text(received) == "1", _text(why))
