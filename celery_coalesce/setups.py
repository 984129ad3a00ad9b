"""``coalesce_setup``: what must be set up once per worker process is set up once.

- It is made before the process's first run of a task that declares it, and handed to every run.
- Tasks that name the same function share one value per process.
- A value is never inherited over a fork: a connection that two processes share is a broken one.
- A set-up that raises has made nothing; the next run tries again.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

__all__ = ["value_of"]


class _Once:
    """What one function made in one process."""

    def __init__(self) -> None:
        # Reentrant: a set-up that needs itself shall fail with RecursionError, and not wait for ever.
        self._making = threading.RLock()
        self._made = False
        self._value: Any = None

    def value(self, function: Callable[[], Any]) -> Any:
        if not self._made:
            with self._making:
                if not self._made:
                    self._value = function()
                    self._made = True
        return self._value


#: By process and function. The entries of a parent process stay, unused: to let go of them could close what the
#: parent still has open.
_values: dict[tuple[int, Callable[[], Any]], _Once] = {}


def value_of(function: Callable[[], Any]) -> Any:
    """Return what a set-up function made in this process, and have it made if it was not.

    Raises:
        Exception: Whatever the function raises. It is called again the next time.
    """
    # setdefault is atomic. A registry with a lock of its own could be forked while another thread holds it.
    return _values.setdefault((os.getpid(), function), _Once()).value(function)
