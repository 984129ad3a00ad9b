"""Frozen values that travel between the layers."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from typing import Any

from .options import Need
from .states import Answer, Disposition, Mode, Outcome, RunState
from .ticks import Tick

__all__ = [
    "Accepted",
    "Advance",
    "Cleared",
    "ClearedKey",
    "ConstraintView",
    "Ended",
    "Envelope",
    "Finished",
    "Followers",
    "Known",
    "Lease",
    "LostLease",
    "MergeWanted",
    "Overdue",
    "RecordView",
    "RolledBack",
    "RunMeta",
    "RunView",
    "Sent",
    "Started",
    "Stop",
    "TaskHistory",
    "Timing",
    "Trigger",
    "TriggerMeta",
    "Woken",
]


@dataclass(frozen=True)
class Trigger:
    """One call that asks for work on a key, as the engine takes it."""

    task_id: str
    key: str
    args: bytes
    call: bytes = b""
    follower: bytes = b""
    store: bool = True
    #: Milliseconds by name: ``delay`` or ``due``, ``ttl`` or ``expires``. The first of each counts from now on the
    #: server's clock, the second is a moment of it.
    times: Mapping[str, int] = field(default_factory=dict)
    #: The run whose body, links or chain make this call.
    within: str | None = None
    #: The id of the message that came without a run.
    message: str | None = None
    #: Whether anybody wants to know the arguments that this trigger replaces.
    watch: bool = False
    needs: tuple[Need, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    #: The tick of a schedule, if beat makes the call.
    tick: Tick | None = None
    #: Milliseconds after which a run that was given its slot, and did not start, is given up; ``None``: never.
    patience: int | None = None


@dataclass(frozen=True)
class Envelope:
    """What a message for a run is made from."""

    state: str
    run: str
    task_id: str
    task: str
    attempt: int
    #: Of the arguments: the record's may be newer by the time the run starts.
    version: int
    #: Milliseconds until the worker may start it.
    delay: int
    args: bytes
    call: bytes


@dataclass(frozen=True)
class Advance:
    """A key whose first waiting run was given way to by a run of another key."""

    state: str


#: What a transition leaves to others.
Sent = Envelope | Advance


@dataclass(frozen=True)
class Stop:
    """A running run that is to be stopped, because a newer trigger replaces it."""

    owner: str
    task_id: str
    run: str


@dataclass(frozen=True)
class Ended:
    """How a run ended that had begun. Times are seconds."""

    #: ``None``: it is no task's, and not remembered.
    outcome: Outcome | None
    #: What went wrong, for people.
    error: str | None = None
    #: Whether it has done anything, so that its key and its constraints rest.
    rests: bool = True
    #: For how long no further run is needed; ``True`` for ever.
    once: float | bool | None = None
    #: How long the key rests before another run of the task, and of whichever task of the scope rests longest.
    cooldown: float = 0.0
    rest: float = 0.0


@dataclass(frozen=True)
class Accepted:
    """What became of a trigger."""

    disposition: Disposition
    run: str
    task_id: str
    run_state: RunState
    #: Milliseconds that the run's message waits; ``None`` if this trigger's caller publishes no message for its own
    #: run.
    delay: int | None
    #: The arguments that this trigger's took the place of, if asked for.
    replaced: bytes
    sent: tuple[Sent, ...]


@dataclass(frozen=True)
class MergeWanted:
    """The arguments that a merge function is to be applied to."""

    #: Empty if there is nothing to merge with any more: the call is made again with its own arguments.
    run: str
    version: int
    args: bytes


@dataclass(frozen=True)
class Known:
    """A message without a run that was admitted before."""

    run: str
    task_id: str
    attempt: int


@dataclass(frozen=True)
class Lease:
    """A slot held by a live worker. Travels from the gate to the pool child in the request."""

    state: str
    run: str
    task_id: str
    task: str
    attempt: int
    token: str
    session: str
    index: int
    triggers: int
    key: str
    scope: str
    owner: str
    #: The mode of the trigger that made the run; ``skip`` if its task is ever called so.
    mode: str = Mode.QUEUE.value
    store: bool = True
    #: ``running``, or how the gate is to end it: ``expired``, ``revoked``.
    answer: str = Answer.RUNNING.value
    #: Milliseconds since the epoch.
    expires: int | None = None
    #: As JSON; empty for none.
    labels: str = ""
    #: The merged arguments, if they are not the message's.
    args: bytes = b""
    #: Where the body runs, and whether anybody follows its events.
    hostname: str = ""
    monitored: bool = False
    #: The monotonic clock of the machine when the lease was given, in seconds.
    leased_at: float = 0.0

    @property
    def began(self) -> bool:
        """Whether the run's body was to be run: it was not ended at the gate, or taken out of the queue."""
        return bool(self.owner) and self.answer == Answer.RUNNING

    @property
    def ref(self) -> str:
        """The lease's name in its holder's index."""
        return f"{self.state}/{self.run}"

    def as_header(self) -> dict[str, Any]:
        """Return what the pool child needs, as plain values."""
        header = asdict(self)
        del header["args"]
        return header

    @classmethod
    def from_header(cls, header: Mapping[str, Any]) -> Lease | None:
        """Return the lease that the gate left in a request, if it did."""
        if "token" not in header:
            return None
        return cls(**{name: header[name] for name in cls.__dataclass_fields__ if name in header})


@dataclass(frozen=True)
class Timing:
    """How long things may take, in milliseconds."""

    lease: int = 30_000
    redispatch: int = 60_000
    #: How long a message without a run is remembered.
    remember: int = 7_200_000

    @property
    def heartbeat(self) -> int:
        """How often a presence is renewed."""
        return self.lease // 3

    @property
    def soon(self) -> int:
        """Due times within this are woken by a message; for later ones every worker has heard of the timer by then."""
        return 2 * self.heartbeat


@dataclass(frozen=True)
class Started:
    """The gate's answer. ``lease`` is there exactly if the run was leased."""

    answer: Answer
    lease: Lease | None = None
    #: Milliseconds, for ``early``.
    wait: int = 0
    #: The revoked run's call, for ``carry``.
    call: bytes = b""
    #: The task id of the run that had done it once, for ``skipped``.
    done: str = ""
    #: What is to be stopped, for ``stop``.
    stops: tuple[Stop, ...] = ()
    sent: tuple[Sent, ...] = ()


@dataclass(frozen=True)
class Followers:
    """Followers that are still to be told."""

    blobs: tuple[bytes, ...]


@dataclass(frozen=True)
class Finished:
    """A run has ended."""

    sent: tuple[Sent, ...]
    drained: bool
    #: What the drain is announced with, if it was put aside for that.
    drain: bytes = b""


@dataclass(frozen=True)
class LostLease:
    """A lease that was taken from a dead process."""

    lease: Lease
    call: bytes
    #: What is dispatched again; empty if the lease is now the sweeper's, to be ended.
    sent: tuple[Sent, ...]


@dataclass(frozen=True)
class Cleared:
    """A run that will not start, whose callers are to be told."""

    lease: Lease
    call: bytes
    outcome: Outcome = Outcome.REVOKED
    #: Whether a worker has received a message of the run, so that monitors wait for its end.
    received: bool = False
    #: Why it will not run; empty if an operator cleared it.
    why: str = ""


@dataclass(frozen=True)
class ClearedKey:
    """What was taken out of a key's queue."""

    count: int
    #: The runs whose callers the operator's process tells; those that monitors know are told by a worker.
    told_here: tuple[Cleared, ...]
    sent: tuple[Sent, ...]


@dataclass(frozen=True)
class RolledBack:
    """A dispatch that was taken back, or not."""

    #: What may go in its place.
    sent: tuple[Sent, ...] = ()
    #: The session that drained with it, if it had had other runs.
    drained: int | None = None
    last_index: int = 0
    #: Whether it was.
    undone: bool = False


@dataclass(frozen=True)
class Woken:
    """A run whose timer was over."""

    sent: tuple[Sent, ...] = ()
    reason: str = ""
    cleared: Cleared | None = None
    stops: tuple[Stop, ...] = ()


@dataclass(frozen=True)
class Overdue:
    """What nobody has moved on in time."""

    processes: tuple[str, ...]
    refs: tuple[str, ...]
    drains: tuple[bytes, ...]

    def __bool__(self) -> bool:
        return bool(self.processes or self.refs or self.drains)


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


@dataclass(frozen=True)
class ConstraintView:
    """A constraint as it stood when it was looked at.

    Attributes:
        name: Its name.
        limit: How many runs go on at once.
        declared: What its tasks last said about that; ``None`` if none has run since a limit was set.
        running: How many runs hold a slot.
        waiting: How many runs wait in line, one of each key at most.
        rests: Seconds until it has rested.

    .. versionadded:: 0.1
    """

    name: str
    limit: int
    declared: int | None
    running: int
    waiting: int
    rests: float


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
