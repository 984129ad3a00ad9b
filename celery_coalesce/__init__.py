"""celery-coalesce: one run now, at most one follow-up, never two at once.

What it promises, for every key and whatever process is killed at whatever instruction:

- no key has more runs under a live lease than its limit;
- every accepted trigger is covered by a run that starts after it, or ends visibly;
- a burst of calls gives at most two runs;
- every session ends with exactly one drain;
- an idle key leaves nothing behind, and a busy one never stays busy because somebody died.

All as far as the state server kept what it acknowledged.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .coalescer import Coalescer
    from .errors import (
        CoalesceError,
        HoldTimeout,
        InvalidKey,
        LeaseLost,
        NewerRecord,
        NotReentrant,
        OptionError,
        PredecessorFailed,
        QueueFull,
        SettingError,
        StoreError,
        StoreUnavailable,
        Superseded,
        UnknownStep,
    )
    from .holding import HeldLease, Hold
    from .options import Constraint
    from .planning import PlannedRun
    from .result import CoalescedResult
    from .states import Disposition, Outcome, RunState
    from .task import CoalescedTask
    from .views import ConstraintView, RunMeta, RunView, TaskHistory, TriggerMeta

__all__ = [
    "CoalesceError",
    "CoalescedResult",
    "CoalescedTask",
    "Coalescer",
    "Constraint",
    "ConstraintView",
    "Disposition",
    "HeldLease",
    "Hold",
    "HoldTimeout",
    "InvalidKey",
    "LeaseLost",
    "NewerRecord",
    "NotReentrant",
    "OptionError",
    "Outcome",
    "PlannedRun",
    "PredecessorFailed",
    "QueueFull",
    "RunMeta",
    "RunState",
    "RunView",
    "SettingError",
    "StoreError",
    "StoreUnavailable",
    "Superseded",
    "TaskHistory",
    "TriggerMeta",
    "UnknownStep",
]

__version__ = "0.1.0"

#: Where names are that are not errors. Modules are imported when they are first asked for, as Celery's own are.
_HOMES = {
    "CoalescedResult": "result",
    "CoalescedTask": "task",
    "Coalescer": "coalescer",
    "Constraint": "options",
    "ConstraintView": "views",
    "Disposition": "states",
    "HeldLease": "holding",
    "Hold": "holding",
    "Outcome": "states",
    "PlannedRun": "planning",
    "RunMeta": "views",
    "RunState": "states",
    "RunView": "views",
    "TaskHistory": "views",
    "TriggerMeta": "views",
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(f".{_HOMES.get(name, 'errors')}", __name__), name)
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
