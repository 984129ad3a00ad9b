"""A wall clock that is wrong: imported by a Python that has this directory on its path, before everything else.

The file that `WRONG_CLOCK` names holds by how many seconds; it is looked at again at each question, so that the clock
can jump. The monotonic clock is right, as it is on a machine whose wall clock is set.
"""

from __future__ import annotations

import datetime as dt
import os
import time
from pathlib import Path
from typing import Any

_offset_file = Path(os.environ["WRONG_CLOCK"])
_right_time = time.time
_right_datetime = dt.datetime


def _wrong_time() -> float:
    return _right_time() + float(_offset_file.read_text())


class _AnyDatetime(type):
    """Takes what C code makes, which knows the right class, for one of ours."""

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, _right_datetime)


class _WrongDatetime(_right_datetime, metaclass=_AnyDatetime):
    @classmethod
    def now(cls, tz: Any = None) -> Any:
        return _right_datetime.fromtimestamp(_wrong_time(), tz)

    @classmethod
    def utcnow(cls) -> Any:
        return _right_datetime.fromtimestamp(_wrong_time(), dt.timezone.utc).replace(tzinfo=None)


time.time = _wrong_time
dt.datetime = _WrongDatetime  # type: ignore[misc]
