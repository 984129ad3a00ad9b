"""The transitions of producers and of workers that run bodies."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from ..keys import constraint_id, state_id
from ..options import Need
from ..policy import Policy, in_ms
from ..records import (
    Accepted,
    Ended,
    Envelope,
    Finished,
    Followers,
    Known,
    Lease,
    MergeWanted,
    RolledBack,
    Sent,
    Started,
    Trigger,
)
from ..states import Answer, Disposition, OnRetry, Overflow, Rule, RunState
from ..views import RunMeta, begin_drain, pack_drain
from .base import Base, as_blob, as_text, new_nonce

__all__ = ["Running"]

#: How the answers to a trigger begin that are no disposition.
_OTHERS = tuple(word.value.encode() for word in (Answer.MERGE, Answer.KNOWN, Answer.GONE))
_DISPOSITIONS = {word.value: word for word in Disposition}
_RUN_STATES = {word.value: word for word in RunState}

_ANSWERS = {word.value: word for word in Answer}
#: Those to a start that come with a lease.
_LEASED = (Answer.RUNNING, Answer.EXPIRED, Answer.REVOKED, Answer.SKIPPED)

#: Of how many triggers of a key one script takes care, which blocks the server for as long.
MOST_OF_A_KEY = 100

#: A publish that is known to have failed is tried again after this many milliseconds.
UNPUBLISHED_AGAIN = 60_000


class Running(Base):
    """What a call, its message and its run ask of the record."""

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
        return self._accepted(state, self.store.call(*self._trigger(state, policy, trigger, merging)))

    def triggers(
        self, asked: Sequence[tuple[Policy, Trigger, MergeWanted | None]]
    ) -> Iterator[tuple[int, Accepted | MergeWanted | Known | None]]:
        """Accept many triggers of a task, those of one key in their order, in few round trips.

        Of triggers of one key that are to be merged by a function each is taken to build upon the one before it: it is
        merged only if that was, and nobody came between.

        Args:
            asked: The arguments of :meth:`trigger`, of each.

        Yields:
            The position of each, and what became of it.
        """
        states = [state_id(policy.scope, trigger.key) for policy, trigger, _ in asked]
        many = Counter(states)
        together: dict[tuple[str, int | None], list[int]] = {}
        for position, (state, (policy, _, _)) in enumerate(zip(states, asked, strict=True)):
            # Who comes first counts among keys too, where they have a constraint in common.
            together.setdefault((state, position if policy.constraints else None), []).append(position)
        named = new_nonce()
        before: dict[str, str] = {}
        parts: list[tuple[str, list[int]]] = []
        calls = []
        for (state, _), positions in together.items():
            for start in range(0, len(positions), MOST_OF_A_KEY):
                part = positions[start : start + MOST_OF_A_KEY]
                if many[state] == 1:
                    call = self._trigger(state, *asked[part[0]])
                else:
                    nonce = f"{named}.{len(parts)}"
                    call = self._trigger_many(state, [asked[position] for position in part], nonce, before.get(state))
                    before[state] = nonce
                parts.append((state, part))
                calls.append(call)
        for (state, part), reply in zip(parts, self.store.call_many(calls), strict=True):
            accepted = [self._accepted(state, reply)] if many[state] == 1 else self._accepted_many(state, reply)
            yield from zip(part, accepted, strict=True)

    def _trigger(self, state: str, policy: Policy, trigger: Trigger, merging: MergeWanted | None) -> tuple[Any, ...]:
        """Return the call of the store that accepts a trigger."""
        return self._triggering(state, policy, {**_own(trigger, merging), **_shared(trigger)}, [trigger])

    def _trigger_many(
        self,
        state: str,
        asked: Sequence[tuple[Policy, Trigger, MergeWanted | None]],
        nonce: str,
        behind: str | None,
    ) -> tuple[Any, ...]:
        """Return the call of the store that accepts triggers of one key which are made together."""
        policy, first, _ = asked[0]
        many = {"nonce": nonce, "calls": [_own(trigger, merging) for _, trigger, merging in asked], **_shared(first)}
        if policy.merges and policy.rule is Rule.MERGE and policy.overflow is Overflow.MERGE:
            many["behind"] = behind
        return self._triggering(state, policy, many, [trigger for _, trigger, _ in asked])

    def _triggering(
        self, state: str, policy: Policy, asked: dict[str, Any], triggers: Sequence[Trigger]
    ) -> tuple[Any, ...]:
        first = triggers[0]
        name = "trigger"
        keys: tuple[str, ...] = self.store.names.record(state)
        if first.message is not None:
            name = "admit"
            keys = (*keys, self.store.names.seen)
            asked["message"], asked["remember"] = first.message, self.timing.remember
        blobs: list[str | bytes] = [first.key.encode("utf-8", "surrogatepass")]
        for trigger in triggers:
            blobs += (trigger.args, trigger.call, trigger.follower)
        if first.push is not None:
            name = "publish"
            keys = (*keys, first.push.queue)
            blobs += (first.push.before.encode(), first.push.after.encode())
        return name, keys, self._question(state, asked, policy.asked), *blobs

    def _accepted_many(self, state: str, reply: Any) -> list[Accepted | MergeWanted | Known | None]:
        answers, sent = reply
        accepted = [self._accepted(state, answer) for answer in answers]
        if not sent:
            return accepted
        # For the caller to do, whichever of its triggers it was that left it.
        for position, each in enumerate(accepted):
            if isinstance(each, Accepted):
                accepted[position] = each._replace(sent=self._sent(state, sent))
                break
        return accepted

    def _accepted(self, state: str, reply: Any) -> Accepted | MergeWanted | Known | None:
        told, *more = (reply,) if isinstance(reply, bytes) else reply
        if told in _OTHERS:
            if told == _OTHERS[0]:
                return MergeWanted(as_text(more[0]), int(more[1]), as_blob(more[2]))
            return Known(as_text(more[0]), as_text(more[1]), int(more[2])) if more else None
        word, run, where, delay, task_id = as_text(told).split(" ", 4)
        replaced = more[0] if more else b""
        sent = more[1] if len(more) > 1 else ()
        return Accepted(
            disposition=_DISPOSITIONS[word],
            run=run,
            task_id=task_id,
            run_state=_RUN_STATES[where],
            delay=None if delay == "-1" else int(delay),
            replaced=as_blob(replaced),
            sent=self._sent(state, sent) if sent else (),
        )

    def rollback(self, run: RunMeta, *, followers: int = 0, drain: bool = False, announced: bool = True) -> RolledBack:
        """Take back a dispatch whose publish failed, unless others have joined the run since.

        Args:
            run: The run, with as many triggers as are the caller's own.
            followers: How many of its followers are.
            drain: Whether anybody may listen to the drain of its session.
            announced: Whether the caller announces that, and the sweep only if the caller dies.
        """
        names = self.store.names
        asked = {
            "run": str(run.run_id),
            "task_id": run.task_id,
            "again": UNPUBLISHED_AGAIN,
            "triggers": run.triggers,
            "followers": followers,
            "announce_in": self._announce_in(announced) if drain else None,
        }
        keys = (*names.record(run.state_id), names.drains)
        reply = self._call("rollback", keys, run.state_id, asked, begin_drain(run) if drain else b"")
        if as_text(reply[0]) != Answer.ENDED:
            return RolledBack()
        return RolledBack(self._sent(run.state_id, reply[1]), as_blob(reply[2]), undone=True)

    def _announce_in(self, announced: bool) -> int:
        """Return the milliseconds after which the sweep may announce a drain that was put aside."""
        return self.timing.lease if announced else 0

    def unpublished(self, envelope: Envelope) -> None:
        """Note that a run's message was not published; it is tried again in 60 seconds."""
        self._record("unpublished", envelope.state, envelope.run, again=UNPUBLISHED_AGAIN)

    def withdraw(self, envelope: Envelope, why: str) -> tuple[Sent, ...]:
        """Take out a run whose message can not be made, for the sweep to tell its callers why."""
        reply = self._record("withdraw", envelope.state, envelope.run, why=why)
        return self._sent(envelope.state, reply[1]) if as_text(reply[0]) == Answer.CLEARED else ()

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
        asked: dict[str, Any] = {
            "run": envelope.run,
            "task_id": envelope.task_id,
            "task": envelope.task,
            "attempt": envelope.attempt,
            "version": envelope.version,
            "claim": claim,
            "owner": owner,
            "lease": self.timing.lease,
        }
        if late:
            asked["late"] = True
        if revoked:
            asked["revoked"] = True
        keys = (*names.record(state), names.presence, names.held(owner))
        told, *more = self._call("start", keys, state, asked)
        answer = _ANSWERS[as_text(told)]
        if answer in _LEASED:
            leased, changed, done, sent = more if len(more) > 1 else (*more, b"", b"", ())
            lease = Lease(
                state=state,
                run=envelope.run,
                task_id=envelope.task_id,
                task=envelope.task,
                attempt=envelope.attempt,
                owner=owner,
                answer=answer.value,
                args=as_blob(changed),
                **json.loads(as_text(leased)),
            )
            return Started(answer, lease, done=as_text(done), sent=self._sent(state, sent))
        if answer is Answer.EARLY:
            return Started(answer, wait=int(more[0]), sent=self._sent(state, more[1]))
        if answer is Answer.PENDING:
            return Started(answer, sent=self._sent(state, more[0]))
        if answer is Answer.CARRY:
            return Started(answer, call=as_blob(more[0]))
        if answer is Answer.STOP:
            return Started(answer, stops=self._stops(more[0]), sent=self._sent(state, more[1]))
        return Started(answer)

    def check(self, lease: Lease, *, returned: bool = False) -> bool:
        """Return whether a lease still holds; note, if asked to, that the body has returned."""
        reply = self._record("check", lease.state, lease.run, token=lease.token, returned=returned or None)
        return as_text(reply[0]) == Answer.RUNNING

    def superseded(self, lease: Lease) -> bool | None:
        """Return whether a newer trigger waits for the run to end; ``None`` if the lease was lost."""
        reply = self._record("check", lease.state, lease.run, token=lease.token)
        return as_text(reply[1]) == "1" if as_text(reply[0]) == Answer.RUNNING else None

    def followers(self, lease: Lease) -> list[bytes] | None:
        """Return the followers of a run that nobody can join any more; ``None`` if the lease was lost."""
        found: list[bytes] = []
        while True:
            reply = self._record("check", lease.state, lease.run, token=lease.token, returned=True, after=len(found))
            if as_text(reply[0]) != Answer.RUNNING:
                return None
            if len(reply) == 2:  # noqa: PLR2004 - the word, and whether it is superseded
                return found
            found += reply[2:]

    def finish(
        self,
        lease: Lease,
        *,
        told: int = 0,
        ended: Ended | None = None,
        drain: RunMeta | None = None,
        announced: bool = True,
    ) -> Finished | Followers | None:
        """End a run and pass its slots on.

        Args:
            lease: The run's lease.
            told: How many of its followers have been told.
            ended: How it ended, if it had begun.
            drain: What the session's drain is announced with, if anybody may listen.
            announced: Whether the caller announces it, and the sweep only if the caller dies.

        Returns:
            Followers that are still to be told, before the call is made again; what goes on in its place; or
            ``None`` if the lease was lost.
        """
        names = self.store.names
        asked: dict[str, Any] = {"run": lease.run, "token": lease.token, "told": told}
        if drain is not None:
            asked["announce_in"] = self._announce_in(announced)
        if ended is not None:
            if ended.outcome is not None:
                asked["outcome"] = ended.outcome.value
            if ended.error is not None:
                asked["error"] = ended.error
            if ended.rests:
                asked["rests"] = True
            if ended.once:
                asked["once"] = -1 if ended.once is True else in_ms(ended.once)
            if ended.rest:
                asked["cooldown"], asked["rest"] = in_ms(ended.cooldown), in_ms(ended.rest)
        keys = (*names.record(lease.state), names.held(lease.owner), names.drains, names.history)
        blob = pack_drain(drain) if drain is not None else b""
        reply = self._call("finish", keys, lease.state, asked, blob)
        answer = as_text(reply[0])
        if answer == Answer.FOLLOWERS:
            return Followers(tuple(reply[1:]))
        if answer == Answer.LOST:
            return None
        drained = as_text(reply[1]) == "1"
        return Finished(self._sent(lease.state, reply[2:]), drained, blob if drained else b"")

    def retry(
        self,
        lease: Lease,
        task: str,
        args: bytes,
        call: bytes,
        *,
        delay: int | None = None,
        due: int | None = None,
        on_retry: OnRetry = OnRetry.HOLD,
    ) -> tuple[Sent, ...] | None:
        """Keep the run for its next attempt.

        Args:
            lease: This attempt's lease.
            task: The task that makes the next attempt.
            args: Its arguments.
            call: Its call.
            delay: Milliseconds until it is due.
            due: The moment at which it is due, in milliseconds since the epoch.
            on_retry: What becomes of the key until then.

        Returns:
            What is to be published, or ``None`` if the lease was lost.
        """
        names = self.store.names
        asked = {
            "run": lease.run,
            "token": lease.token,
            "task": task,
            "delay": delay,
            "due": due,
            "on_retry": on_retry.value,
        }
        keys = (*names.record(lease.state), names.held(lease.owner))
        reply = self._call("retry", keys, lease.state, asked, args, call)
        if as_text(reply[0]) == Answer.LOST:
            return None
        return self._sent(lease.state, reply[1])

    def requeue(self, lease: Lease) -> tuple[Sent, ...] | None:
        """Wait for the message that the broker gives back, or that the caller publishes anew.

        Returns:
            What to publish if the broker does not give it back, or ``None`` if the lease was lost.
        """
        names = self.store.names
        asked = {"run": lease.run, "token": lease.token}
        keys = (*names.record(lease.state), names.held(lease.owner))
        reply = self._call("requeue", keys, lease.state, asked)
        return self._sent(lease.state, reply[1]) if as_text(reply[0]) == Answer.DISPATCHED else None

    def carry(self, envelope: Envelope, new_task_id: str, call: bytes) -> tuple[Sent, ...]:
        """Carry the triggers that had joined a revoked run over to a new run of the key."""
        asked = {
            "run": envelope.run,
            "task_id": envelope.task_id,
            "new_task_id": new_task_id,
        }
        reply = self._call("carry", self.store.names.record(envelope.state), envelope.state, asked, call)
        return self._sent(envelope.state, reply[1]) if as_text(reply[0]) == Answer.DISPATCHED else ()


def _own(trigger: Trigger, merging: MergeWanted | None) -> dict[str, Any]:
    """Return what a trigger asks for that others of its batch may not."""
    own: dict[str, Any] = {"task_id": trigger.task_id}
    if trigger.needs:
        own["needs"] = [_need(need) for need in trigger.needs]
    if trigger.tick is not None:
        tick = trigger.tick
        own["tick"] = {"entry": tick.entry, "by": tick.by, "lasts": in_ms(tick.lasts), "moment": tick.moment}
    if trigger.labels:
        own["labels"] = json.dumps(trigger.labels)
    if merging is not None:
        own["target"], own["base"] = merging.run, merging.version
    return own


def _shared(trigger: Trigger) -> dict[str, Any]:
    """Return what a trigger asks for as all others of its batch do."""
    shared: dict[str, Any] = {"store": trigger.store, **trigger.times}
    if trigger.within is not None:
        shared["within"] = trigger.within
    if trigger.watch:
        shared["watch"] = True
    if trigger.patience is not None:
        shared["patience"] = trigger.patience
    return shared


def _need(need: Need) -> dict[str, Any]:
    # The name is shown to people; the id is what counts.
    shown = need.name.encode("utf-8", "replace").decode()
    return {"id": constraint_id(need.name), "name": shown, "limit": need.limit, "cooldown": in_ms(need.cooldown)}
