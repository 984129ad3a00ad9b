"""Times that bodies tell, over a socket of this machine: no Redis, no Celery, some microseconds each."""

from __future__ import annotations

import json
import os
import queue
import socket
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing_extensions import Self

#: Where a worker finds the socket.
VARIABLE = "SPEED_STAMPS"

_sender = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)


def stamp(event: str, **fields: Any) -> None:
    """Tell that something happens now."""
    text = json.dumps({"event": event, "at": time.time(), **fields})
    _sender.sendto(text.encode(), os.environ[VARIABLE])


class Stamps:
    """Receives what bodies tell; use as a context manager."""

    def __init__(self) -> None:
        self._directory = tempfile.TemporaryDirectory(prefix="speed-")
        self.path = str(Path(self._directory.name) / "socket")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.path)
        self._arrived: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._receive, name="stamps", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._socket.sendto(b"", self.path)
        self._thread.join(10)
        self._socket.close()
        self._directory.cleanup()

    def wait(self, event: str, key: str, timeout: float = 60) -> dict[str, Any]:
        """Return the next stamp of an event and a key; those in between are dropped."""
        return self.until(event, timeout, key=key)[-1]

    def until(self, event: str, timeout: float = 60, **fields: Any) -> list[dict[str, Any]]:
        """Return the stamps up to the next one of an event with the given fields."""
        deadline = time.monotonic() + timeout
        found = []
        wanted = {"event": event, **fields}
        while True:
            try:
                found.append(self._arrived.get(timeout=max(deadline - time.monotonic(), 0)))
            except queue.Empty:
                raise TimeoutError(f"no {wanted} in {timeout} s") from None
            if wanted.items() <= found[-1].items():
                return found

    def rest(self, seconds: float) -> list[dict[str, Any]]:
        """Return what arrives within a time."""
        time.sleep(seconds)
        found = []
        while not self._arrived.empty():
            found.append(self._arrived.get())
        return found

    def _receive(self) -> None:
        while data := self._socket.recv(65536):
            self._arrived.put(json.loads(data))
