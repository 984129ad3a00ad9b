"""The log of a storm: what every process saw, on one clock.

A line is written by a single system call, so it is there once the call has returned, even if the process is killed
right after. The clock is the machine's monotonic one, which all its processes share.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

__all__ = ["Event", "Log"]

Event = dict[str, Any]


class Log:
    """A directory of events, with a file for each process that wrote any.

    Args:
        directory: Where the files are.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._pid = 0
        self._file = -1

    def write(self, event: str, *, at: float | None = None, **fields: Any) -> None:
        """Write an event, now or `at` an earlier moment."""
        if self._pid != os.getpid():
            # Also after a fork: a child has a file of its own.
            self._pid = os.getpid()
            path = self.directory / f"{self._pid}.{time.monotonic_ns()}.log"
            self._file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        line = {"at": time.monotonic() if at is None else at, "event": event, "pid": self._pid, **fields}
        os.write(self._file, json.dumps(line).encode() + b"\n")

    def read(self) -> list[Event]:
        """Return all events in the order in which they happened."""
        return in_order(json.loads(line) for path in self.directory.glob("*.log") for line in path.open())


def in_order(events: Iterable[Event]) -> list[Event]:
    """Return events in the order in which they happened."""
    return sorted(events, key=lambda event: event["at"])
