"""What can go wrong, as a tree that callers can branch on.

Each is built from its ``args`` alone, so that it survives pickling and a result backend. "Lost" differs from "never
had": :exc:`LeaseLost` is the end of a run that had its slot, :exc:`StoreUnavailable` says nothing about any run.
"""

from __future__ import annotations

from celery.exceptions import ImproperlyConfigured, WorkerLostError
from kombu.exceptions import OperationalError

__all__ = [
    "CoalesceError",
    "InvalidKey",
    "LeaseLost",
    "OptionError",
    "QueueFull",
    "SettingError",
    "StoreError",
    "StoreUnavailable",
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


class LeaseLost(CoalesceError, WorkerLostError):
    """A run lost its lease: its worker was not heard of in time, and the key went on without it."""


class StoreError(CoalesceError):
    """The state server refused a command."""


class StoreUnavailable(CoalesceError, OperationalError):
    """The state server can not be reached. A ``kombu.exceptions.OperationalError``, as a dead broker raises."""
