"""A TCP proxy that counts what a client asks of a Redis: round trips, and the commands in them."""

from __future__ import annotations

import socket
import threading
from collections import Counter
from contextlib import suppress
from typing import TYPE_CHECKING

from tests.support.process import HOST

if TYPE_CHECKING:
    from typing_extensions import Self


#: By what a transition is called: as a function of the server's, or as a script.
TRANSITION = frozenset({"FCALL", "EVALSHA", "EVAL"})


class CountingProxy:
    """Forwards to a server, and notes every command that passes.

    Attributes:
        target_port: The server's own port.
        commands: The commands so far, upper case, oldest first.
        round_trips: How often a client spoke after the server had; what is sent in one go is one.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self._listener = socket.create_server((HOST, 0))
        self.port: int = self._listener.getsockname()[1]
        self.commands: list[str] = []
        self.round_trips = 0
        self._sockets: list[socket.socket] = [self._listener]
        self._guard = threading.Lock()

    def __enter__(self) -> Self:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        for each in self._sockets:
            with suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()

    def forget(self) -> None:
        """Start to count anew."""
        with self._guard:
            self.commands.clear()
            self.round_trips = 0

    def counted(self) -> dict[str, int]:
        """Return how often each command was sent, a transition by whichever it is called."""
        with self._guard:
            return dict(Counter("transition" if name in TRANSITION else name for name in self.commands))

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                server = socket.create_connection((HOST, self.target_port))
                self._sockets += [client, server]
                spoke = threading.Event()  # the client has, and the server has not answered yet
                threading.Thread(target=self._asked, args=(client, server, spoke), daemon=True).start()
                threading.Thread(target=self._answered, args=(server, client, spoke), daemon=True).start()

    def _asked(self, client: socket.socket, server: socket.socket, spoke: threading.Event) -> None:
        pending = b""
        with suppress(OSError):
            while data := client.recv(65536):
                pending += data
                with self._guard:
                    if not spoke.is_set():
                        self.round_trips += 1
                        spoke.set()
                    while taken := _command(pending):
                        name, pending = taken
                        self.commands.append(name)
                server.sendall(data)

    def _answered(self, server: socket.socket, client: socket.socket, spoke: threading.Event) -> None:
        with suppress(OSError):
            while data := server.recv(65536):
                spoke.clear()
                client.sendall(data)


def _command(data: bytes) -> tuple[str, bytes] | None:
    """Return the first command's name, and the rest; None if it is not complete."""
    head, newline, rest = data.partition(b"\r\n")
    if not newline or not head.startswith(b"*"):
        return None
    words = []
    for _ in range(int(head[1:])):
        size, newline, rest = rest.partition(b"\r\n")
        length = int(size[1:] or 0) if newline else 0
        if not newline or len(rest) < length + 2:
            return None
        words.append(rest[:length])
        rest = rest[length + 2 :]
    return words[0].decode().upper(), rest
