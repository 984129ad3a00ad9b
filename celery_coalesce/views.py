"""Values that applications see: of a run, a trigger, a key, a constraint, a task."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from .keys import state_id
from .policy import Policy
from .records import Accepted, Envelope, Lease
from .states import Disposition, Outcome, RunState

__all__ = [
    "ConstraintView",
    "RecordView",
    "RunMeta",
    "RunView",
    "TaskHistory",
    "TriggerMeta",
    "begin_drain",
    "pack_drain",
    "unpack_drain",
]


@dataclass(frozen=True)
class RunMeta:
    """One run, as the body (``self.coalesce``) and every event see it.

    Attributes:
        key: The key.
        scope: What the key is unique in.
        type: ``"key"``, or ``"task"`` if the whole task is one key.
        name: The task's name.
        task_id: The run's Celery task id, the same for all its attempts.
        state_id: The key's id, the same for ever.
        session_id: The burst of the key that the run belongs to.
        run_id: The run. Unique, and growing.
        run_index: The run's position in its session, from 0.
        attempt: How often the run was tried before, from 0.
        token: The fencing token of this attempt's lease. Grows with every lease of the key.
        triggers: How many calls the run covers.
        labels: The labels of the call that made the run.
        is_rerun: Whether the run is a follow-up (``run_index > 0``).

    .. versionadded:: 0.1
    """

    key: str
    scope: str
    type: str
    name: str
    task_id: str
    state_id: str
    session_id: int
    run_id: int
    run_index: int
    attempt: int
    token: int
    triggers: int
    labels: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_rerun(self) -> bool:
        """Whether the run is a follow-up."""
        return self.run_index > 0

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for events and logs."""
        return {**asdict(self), "is_rerun": self.is_rerun}

    @classmethod
    def unstarted(
        cls,
        policy: Policy,
        key: str,
        accepted: Accepted | Envelope,
        *,
        triggers: int = 1,
        labels: Mapping[str, str] | None = None,
    ) -> RunMeta:
        """Return what whoever made a run knows of it, before it has begun.

        Args:
            policy: The task's options.
            key: The key.
            accepted: What the record said of the run.
            triggers: How many calls it covers, as far as is known.
            labels: The labels of the call that made it.
        """
        return cls(
            key=key,
            scope=policy.scope,
            type="task" if policy.whole_task else "key",
            name=policy.task,
            task_id=accepted.task_id,
            state_id=state_id(policy.scope, key),
            session_id=0,
            run_id=int(accepted.run),
            run_index=0,
            attempt=0,
            token=0,
            triggers=triggers,
            labels=labels or {},
        )

    @classmethod
    def of(cls, lease: Lease) -> RunMeta:
        """Return what a lease says of its run."""
        return cls(
            key=lease.key,
            scope=lease.scope,
            type="task" if lease.key == lease.task else "key",
            name=lease.task,
            task_id=lease.task_id,
            state_id=lease.state,
            session_id=int(lease.session),
            run_id=int(lease.run),
            run_index=lease.index,
            attempt=lease.attempt,
            token=int(lease.token),
            triggers=lease.triggers,
            labels=json.loads(lease.labels) if lease.labels else {},
        )


def pack_drain(meta: RunMeta) -> bytes:
    """Return what a drain is announced with, as it is put aside in the store."""
    return json.dumps(asdict(meta)).encode()


def begin_drain(meta: RunMeta) -> bytes:
    """Return the beginning of what a drain is announced with, where only the record knows session and run index."""
    known = {name: value for name, value in asdict(meta).items() if name not in ("session_id", "run_index")}
    return json.dumps(known).encode().removesuffix(b"}")


def unpack_drain(blob: bytes) -> RunMeta:
    """Return what a drain is announced with."""
    return RunMeta(**json.loads(blob))


@dataclass(frozen=True)
class ConstraintView:
    """A constraint as it stood when it was looked at.

    Attributes:
        name: Its name.
        limit: How many runs go on at once.
        declared: What its tasks last said about that; ``None`` if none has run since a limit was set.
        running: How many runs hold a slot.
        waiting: How many runs wait in line, one of each key at most.
        cooldown_left: Seconds until another run may start, as far as its cooldown goes.

    .. versionadded:: 0.1
    """

    name: str
    limit: int
    declared: int | None
    running: int
    waiting: int
    cooldown_left: float


@dataclass(frozen=True)
class TaskHistory:
    """What is remembered of a task.

    Attributes:
        runs: How many runs have ended.
        errors: How many of them failed.
        last_error: The last failure's exception, ``None`` once a run has succeeded.
        last_run_id: The last run that ended; ``None`` if there was none.
        last_task_id: Its task id.
        last_end: When it ended.
        last_outcome: How it ended.

    .. versionadded:: 0.1
    """

    runs: int
    errors: int
    last_error: str | None = None
    last_run_id: int | None = None
    last_task_id: str | None = None
    last_end: datetime | None = None
    last_outcome: Outcome | None = None


@dataclass(frozen=True)
class RecordView:
    """A record as it stood when it was read."""

    key: str
    head: Mapping[str, Any]
    runs: tuple[Mapping[str, Any], ...]
    #: The server's clock, in milliseconds.
    now: int


@dataclass(frozen=True)
class RunView:
    """A run as it stood when it was looked at.

    Attributes:
        key: The key.
        scope: What the key is unique in.
        name: The task's name.
        task_id: The run's Celery task id.
        state_id: The key's id.
        session_id: The burst of the key that the run belongs to.
        run_id: The run.
        state: Where it is: ``pending``, ``dispatched``, ``running``, ``retrying``, ``cleared``.
        triggers: How many calls it covers.
        attempt: How often it was tried before.
        due: Before this moment it does not start.
        labels: The labels of the call that made it.

    .. versionadded:: 0.1
    """

    key: str
    scope: str
    name: str
    task_id: str
    state_id: str
    session_id: int
    run_id: int
    state: RunState
    triggers: int
    attempt: int
    due: datetime
    labels: Mapping[str, str]

    @classmethod
    def all_of(cls, state: str, view: RecordView) -> tuple[RunView, ...]:
        """Return the runs of a record, in the order in which they were accepted."""
        return tuple(
            cls(
                key=view.key,
                scope=view.head["scope"],
                name=run["task"],
                task_id=run["task_id"],
                state_id=state,
                session_id=int(view.head["session"]),
                run_id=int(run["id"]),
                state=RunState(run["state"]),
                triggers=run["triggers"],
                attempt=run["attempt"],
                due=datetime.fromtimestamp(run["due"] / 1000, timezone.utc),
                labels=json.loads(run["labels"]) if run.get("labels") else {},
            )
            for run in sorted(view.runs, key=lambda run: int(run["seq"]))
        )


@dataclass(frozen=True)
class TriggerMeta:
    """One trigger, as ``coalesce_trigger`` reports it.

    Attributes:
        key: The key.
        scope: What the key is unique in.
        name: The task's name.
        task_id: The call's own task id; that of the run unless the call is a follower.
        state_id: The key's id.
        disposition: What became of the trigger.
        run_id: The run that covers it.
        run_task_id: That run's task id.
        run_state: Where that run was: ``pending``, ``dispatched``, ``running``, ``retrying``; ``ended`` if it was done
            once and for all.
        labels: The call's labels.

    .. versionadded:: 0.1
    """

    key: str
    scope: str
    name: str
    task_id: str
    state_id: str
    disposition: Disposition
    run_id: int
    run_task_id: str
    run_state: RunState
    labels: Mapping[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, for events and logs."""
        return {**asdict(self), "disposition": self.disposition.value, "run_state": self.run_state.value}
