"""What can go wrong, as a tree that callers can branch on.

Each is built from its ``args`` alone, so that it survives pickling and a result backend. "Lost" differs from "never
had": :exc:`LeaseLost` is the end of a run that had its slot, :exc:`StoreUnavailable` says nothing about any run.
"""

from __future__ import annotations

from celery.exceptions import ImproperlyConfigured, TaskRevokedError, WorkerLostError
from kombu.exceptions import OperationalError

__all__ = [
    "CoalesceError",
    "HoldTimeout",
    "InvalidKey",
    "LeaseLost",
    "NewerRecord",
    "NotReentrant",
    "OptionError",
    "PredecessorFailed",
    "QueueFull",
    "SettingError",
    "StoreError",
    "StoreUnavailable",
    "Superseded",
    "UnknownStep",
]


class CoalesceError(Exception):
    """Base class of every error that celery-coalesce raises."""


class OptionError(CoalesceError, ImproperlyConfigured):
    """A task's options do not make sense; raised when the task is bound to its app, or at the call.

    Attributes:
        task: Name of the task.
        option: Name of the option.
        value: The offending value.
        problem: What is wrong with it.
        remedy: What to do about it.
    """

    def __init__(self, task: str, option: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(task, option, value, problem, remedy)
        self.task, self.option, self.value = task, option, value
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.task}: {self.option}={self.value!r} {self.problem}; {self.remedy}"


class SettingError(CoalesceError, ImproperlyConfigured):
    """An app setting does not make sense, or the state server can not be used.

    Attributes:
        setting: Name of the setting.
        value: The offending value, without passwords.
        problem: What is wrong with it.
        remedy: What to do about it.
    """

    def __init__(self, setting: str, value: object, problem: str, remedy: str) -> None:
        super().__init__(setting, value, problem, remedy)
        self.setting, self.value = setting, value
        self.problem, self.remedy = problem, remedy

    def __str__(self) -> str:
        return f"{self.setting}={self.value!r} {self.problem}; {self.remedy}"


class InvalidKey(CoalesceError, ValueError):
    """A call's key is not a non-empty string. Nothing was enqueued.

    Attributes:
        task: Name of the task.
        value: What was given as its key.
        problem: What is wrong with it.
    """

    def __init__(self, task: str, value: object, problem: str) -> None:
        super().__init__(task, value, problem)
        self.task, self.value, self.problem = task, value, problem

    def __str__(self) -> str:
        return f"{self.task}: {self.problem}"


class QueueFull(CoalesceError):
    """``coalesce_overflow="reject"``: as many runs wait as may. Nothing was enqueued.

    Attributes:
        task: Name of the task.
        key: The key.
        run_id: The last run that waits.
    """

    def __init__(self, task: str, key: str, run_id: int) -> None:
        super().__init__(task, key, run_id)
        self.task, self.key, self.run_id = task, key, run_id

    def __str__(self) -> str:
        return (
            f"{self.task}: key {self.key!r} has as many waiting runs as coalesce_max_queued allows; "
            'call again later, or use coalesce_overflow="merge"'
        )


class PredecessorFailed(CoalesceError):
    """``coalesce_on_error="stop"``: the run did not start, because one before it in the line failed.

    Attributes:
        task: Name of the task.
        key: The key.
        problem: Which run failed, and how.
    """

    def __init__(self, task: str, key: str, problem: str) -> None:
        super().__init__(task, key, problem)
        self.task, self.key, self.problem = task, key, problem

    def __str__(self) -> str:
        return f"{self.task}: key {self.key!r} was stopped: {self.problem}; call again"


class Superseded(CoalesceError, TaskRevokedError):
    """``coalesce="replace"``: the run was stopped, because a newer trigger replaces it.

    A body that stops by itself may raise it as well.

    Attributes:
        task: Name of the task.
        key: The key.
    """

    def __init__(self, task: str = "", key: str = "") -> None:
        super().__init__(task, key)
        self.task, self.key = task, key

    def __str__(self) -> str:
        return f"{self.task}: a newer trigger of key {self.key!r} replaces this run" if self.task else "superseded"


class HoldTimeout(CoalesceError, TimeoutError):
    """A key was not free in time.

    Attributes:
        key: The key.
        timeout: For how long it was waited, in seconds.
    """

    def __init__(self, key: str, timeout: float) -> None:
        super().__init__(key, timeout)
        self.key, self.timeout = key, timeout

    def __str__(self) -> str:
        return f"key {self.key!r} was not free within {self.timeout} s; wait longer, or try again later"


class NotReentrant(CoalesceError, RuntimeError):
    """A key was to be held by who has it already: it would wait for itself.

    Attributes:
        key: The key.
    """

    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key

    def __str__(self) -> str:
        return f"key {self.key!r} is held by this very code already; hold it once around both, or leave it first"


class UnknownStep(CoalesceError, LookupError):
    """A body named a step that its task does not declare.

    Attributes:
        task: Name of the task.
        step: The step.
        known: The steps that are declared.
    """

    def __init__(self, task: str, step: str, known: list[str]) -> None:
        super().__init__(task, step, known)
        self.task, self.step, self.known = task, step, known

    def __str__(self) -> str:
        known = ", ".join(map(repr, self.known)) or "none"
        return f"{self.task}: {self.step!r} is no step of coalesce_steps; known are: {known}"


class LeaseLost(CoalesceError, WorkerLostError):
    """A run lost its lease: its worker was not heard of in time, and the key went on without it."""


class StoreError(CoalesceError):
    """The state server refused a command."""


class StoreUnavailable(CoalesceError, OperationalError):
    """The state server can not be reached, or can not do now what it is asked for.

    A ``kombu.exceptions.OperationalError``, as a dead broker raises. What was asked for may have been carried out: the
    answer was lost, or there were not the replicas that ``coalesce_wait_replicas`` asks for.
    """


class NewerRecord(StoreUnavailable, StoreError):
    """The key was last touched by a newer celery-coalesce, whose record this one can not read.

    Of all keys only this one is refused, until its session has ended or the process is upgraded. A worker keeps the
    key's messages meanwhile.
    """
