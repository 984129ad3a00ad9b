"""The transitions of operators."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime, timezone

from ..keys import constraint_id, state_id
from ..records import Advance, Cleared, ClearedKey, Lease, Sent
from ..states import Answer, Outcome
from ..views import ConstraintView, RecordView, TaskHistory
from .base import Base, as_text

__all__ = ["Operating"]


class Operating(Base):
    """What is looked at, and what is set, from outside."""

    def clear(
        self,
        scope: str,
        key: str,
        task: str | None = None,
        *,
        outcome: Outcome = Outcome.REVOKED,
        why: str = "",
        forget: bool = False,
        by: Lease | None = None,
    ) -> ClearedKey:
        """Take what has not started out of a key's queue.

        Args:
            scope: The key's scope.
            key: The key.
            task: Only this task's runs; ``None`` for all of the scope.
            outcome: How these runs end.
            why: What their callers are told.
            forget: Whether what was done once is to be done again.
            by: The lease in whose name it is done. Once it is lost nothing more is taken out.
        """
        state = state_id(scope, key)
        count = 0
        told_here: list[Cleared] = []
        sent: list[Sent] = []
        cursor, bound = "0", None
        while True:
            asked = {
                "cursor": cursor,
                "bound": bound,
                "task": task or "",
                "lease": self.timing.lease,
                "outcome": outcome.value,
                "why": why,
                "forget": forget or None,
                "run": by and by.run,
                "token": by and by.token,
            }
            reply = self._call("clear", self.store.names.record(state), state, asked)
            if as_text(reply[0]) == Answer.LOST:
                return ClearedKey(count, tuple(told_here), tuple(sent))
            cursor, bound = as_text(reply[1]), as_text(reply[2])
            count += int(reply[3])
            sent += self._sent(state, reply[4])
            told_here += [self._cleared(state, run) for run in reply[5]]
            if cursor == "0":
                return ClearedKey(count, tuple(told_here), tuple(sent))

    def show(self, scope: str, key: str) -> RecordView | None:
        """Return a key's record, ``None`` if the key is idle."""
        return self.show_state(state_id(scope, key))

    def show_state(self, state: str, run: str | None = None) -> RecordView | None:
        """Return the record with a state id, ``None`` if its key is idle.

        Args:
            state: The state id.
            run: Only this run of it.
        """
        reply = self._call("show", self.store.names.record(state), state, {"run": run})
        if as_text(reply[0]) == Answer.IDLE:
            return None
        view = json.loads(reply[2])
        return RecordView(as_text(reply[1]), view["head"], tuple(view["runs"] or ()), int(view["now"]))

    def lease_of(self, ref: str, owner: str) -> Lease | None:
        """Return the lease of that name, if the process still holds it."""
        state, run_id = ref.split("/")
        view = self.show_state(state, run_id)
        if view is None:
            return None
        for run in view.runs:
            if run.get("owner") == owner:
                return Lease(
                    state=state,
                    run=run_id,
                    task_id=run["task_id"],
                    task=run["task"],
                    attempt=run["attempt"],
                    token=run["token"],
                    session=view.head["session"],
                    index=run["index"],
                    triggers=run["triggers"],
                    key=view.key,
                    scope=view.head["scope"],
                    owner=owner,
                )
        return None

    def busy(self) -> set[str]:
        """Return the state ids of busy keys.

        Each has a run that a clock or a message moves next, one that a process holds, or one in a constraint's line. A
        key that goes from one to the other while it is looked for may be left out.
        """
        names = self.store.names
        _, _, lines, _ = names.constraints
        held = map(names.held, self._indexed(names.presence))
        # The timers once more: what was held, and has come back to them meanwhile.
        indexes = (names.timers, lines, *held, names.timers)
        refs = (ref for index in indexes for ref in self._indexed(index))
        return {ref.split("/")[-2] for ref in refs if "/" in ref}

    def _indexed(self, index: str) -> Iterator[str]:
        cursor = "0"
        while True:
            _, following, *found = self._plain("keys", (index,), cursor=cursor)
            yield from map(as_text, found)
            cursor = as_text(following)
            if cursor == "0":
                return

    def set_limit(self, name: str, limit: int | None) -> tuple[Sent, ...]:
        """Set how many runs a constraint lets go on at once; ``None`` gives it back to its tasks."""
        limits, slots, lines, _ = self.store.names.constraints
        keys = (self.store.names.timers, limits, slots, lines)
        shown = name.encode("utf-8", "replace").decode()
        reply = self._plain("limit", keys, id=constraint_id(name), name=shown, limit=limit)
        return tuple(Advance(as_text(state)) for state in reply[1:])

    def constraints(self) -> Iterator[ConstraintView]:
        """Yield the constraints that are in use or have a limit of their own."""
        cursor = "0"
        while True:
            reply = self._plain("constraints", self.store.names.constraints, cursor=cursor)
            for name, declared, own, running, waiting, left in reply[2:]:
                yield ConstraintView(
                    name=as_text(name),
                    declared=int(declared) if int(declared) >= 0 else None,
                    limit=int(own) if int(own) >= 0 else int(declared),
                    running=int(running),
                    waiting=int(waiting),
                    cooldown_left=int(left) / 1000,
                )
            cursor = as_text(reply[1])
            if cursor == "0":
                return

    def history(self, task: str) -> TaskHistory:
        """Return what is remembered of a task."""
        _, runs, errors, error, last = self._plain("history", (self.store.names.history,), task=task)
        if not last:
            return TaskHistory(int(runs), int(errors), as_text(error) or None)
        run, task_id, at, outcome = last
        return TaskHistory(
            runs=int(runs),
            errors=int(errors),
            last_error=as_text(error) or None,
            last_run_id=int(run),
            last_task_id=as_text(task_id),
            last_end=datetime.fromtimestamp(int(at) / 1000, timezone.utc),
            last_outcome=Outcome(as_text(outcome)),
        )
