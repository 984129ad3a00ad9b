"""A TCP proxy that can cut, delay and swallow."""

from __future__ import annotations

import socket
import threading
from contextlib import suppress
from typing import TYPE_CHECKING

from tests.support.process import HOST, free_port

if TYPE_CHECKING:
    from typing_extensions import Self


class TCPProxy:
    """Forwards local connections to a local port, as its switches allow.

    Attributes:
        drop_replies: what the server says is lost, the connection stays.
        dropped: set once a reply was lost since `drop_replies` was last switched on.
        delay: seconds that each piece of data waits, in either direction.
    """

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = free_port()
        self.delay = 0.0
        self.dropped = threading.Event()
        self._drop_replies = False
        self._closing = threading.Event()  # ends the delays of the connections of one listener
        self._listener: socket.socket | None = None
        self._sockets: set[socket.socket] = set()
        self._guard = threading.Lock()

    @property
    def drop_replies(self) -> bool:
        """Whether what the server says is lost."""
        return self._drop_replies

    @drop_replies.setter
    def drop_replies(self, value: bool) -> None:
        if value:
            self.dropped.clear()
        self._drop_replies = value

    def start(self) -> Self:
        """Start to listen."""
        self.heal()
        return self

    def cut(self) -> None:
        """Close every connection and refuse new ones."""
        with self._guard:
            self._closing.set()
            doomed, self._sockets = self._sockets, set()
            if self._listener is not None:
                doomed.add(self._listener)
                self._listener = None
        for each in doomed:
            _close(each)

    def heal(self) -> None:
        """Accept connections again, on the same port."""
        with self._guard:
            if self._listener is not None:
                return
            self._closing = threading.Event()
            self._listener = socket.create_server((HOST, self.port))
            self._spawn(self._accept, self._listener)

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.cut()

    def _spawn(self, target: object, *args: object) -> None:
        threading.Thread(target=target, args=args, daemon=True).start()  # type: ignore[arg-type]

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            try:
                server = socket.create_connection((HOST, self.target_port), timeout=5)
                server.settimeout(None)
            except OSError:
                client.close()
                continue
            with self._guard:
                alive = self._listener is listener
                if alive:
                    self._sockets |= {client, server}
                    closing = self._closing
            if not alive:
                client.close()
                server.close()
                return
            self._spawn(self._pump, client, server, closing, False)
            self._spawn(self._pump, server, client, closing, True)

    def _pump(self, source: socket.socket, sink: socket.socket, closing: threading.Event, replies: bool) -> None:
        try:
            while data := source.recv(65536):
                if self.delay:
                    closing.wait(self.delay)
                if replies and self.drop_replies:
                    self.dropped.set()
                    continue
                sink.sendall(data)
        except OSError:
            pass
        with self._guard:
            self._sockets -= {source, sink}
        _close(source)
        _close(sink)


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads or accepts
    end.close()
