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

from .errors import (
    CoalesceError,
    InvalidKey,
    LeaseLost,
    OptionError,
    QueueFull,
    SettingError,
    StoreError,
    StoreUnavailable,
)
from .records import RunMeta, TriggerMeta
from .result import CoalescedResult
from .states import Disposition, Outcome
from .task import CoalescedTask

__all__ = [
    "CoalesceError",
    "CoalescedResult",
    "CoalescedTask",
    "Disposition",
    "InvalidKey",
    "LeaseLost",
    "OptionError",
    "Outcome",
    "QueueFull",
    "RunMeta",
    "SettingError",
    "StoreError",
    "StoreUnavailable",
    "TriggerMeta",
]

__version__ = "0.1.0"
