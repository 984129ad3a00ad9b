"""A TCP proxy that can cut, delay, swallow and repeat."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

from tests.support.process import HOST, free_port

if TYPE_CHECKING:
    from typing_extensions import Self

#: What can go wrong with one request, see :meth:`TCPProxy.strike`.
FAULTS = ("drop request", "cut request", "drop reply", "cut reply", "delay", "repeat")


class TCPProxy:
    """Forwards local connections to a local port, as its switches allow.

    Attributes:
        drop_replies: what the server says is lost, the connection stays.
        dropped: set once a reply was lost since `drop_replies` was last switched on.
        delay: seconds that each piece of data waits, in either direction.
        struck: set once a request was found that a fault was meant for.
    """

    #: Seconds that a struck request is delayed: less than anybody waits for an answer.
    LATE = 1.5

    def __init__(self, target_port: int) -> None:
        self.target_port = target_port
        self.port = free_port()
        self.delay = 0.0
        self.dropped = threading.Event()
        self.struck = threading.Event()
        self._fault: tuple[str, bytes] | None = None
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

    def strike(self, fault: str, about: bytes) -> None:
        """Let one thing go wrong with the next request that contains some bytes.

        Args:
            fault: ``drop request``: the server never sees it, the connection stays; ``cut request``: nor does it, and
                the connection is closed; ``drop reply``: it is carried out, and no more is heard on this connection;
                ``cut reply``: half of the reply is heard; ``delay``; ``repeat``: it is carried out twice.
            about: What the request contains.
        """
        self.struck.clear()
        self._fault = (fault, about)

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
            ailing: list[str] = []
            self._spawn(self._pump, client, server, closing, partial(self._send_on, ailing=ailing, closing=closing))
            self._spawn(self._pump, server, client, closing, partial(self._answer, ailing=ailing))

    def _pump(
        self,
        source: socket.socket,
        sink: socket.socket,
        closing: threading.Event,
        forward: Callable[[bytes, socket.socket], bool],
    ) -> None:
        try:
            while data := source.recv(65536):
                if self.delay:
                    closing.wait(self.delay)
                if not forward(data, sink):
                    break
        except OSError:
            pass
        with self._guard:
            self._sockets -= {source, sink}
        _close(source)
        _close(sink)

    def _send_on(self, request: bytes, server: socket.socket, *, ailing: list[str], closing: threading.Event) -> bool:
        """Forward what a client says; return whether the connection goes on."""
        fault = self._taken(request)
        if fault == "drop request":
            return True
        if fault == "cut request":
            return False
        if fault == "delay":
            closing.wait(self.LATE)
        if fault in ("drop reply", "cut reply"):
            ailing.append(fault)
        server.sendall(request)
        if fault == "repeat":
            # Over a connection of its own, so that its reply is nobody's.
            with socket.create_connection((HOST, self.target_port), timeout=5) as again:
                again.sendall(request)
                again.recv(65536)
        return True

    def _answer(self, reply: bytes, client: socket.socket, *, ailing: list[str]) -> bool:
        """Forward what the server says; return whether the connection goes on."""
        if self.drop_replies:
            self.dropped.set()
        elif "cut reply" in ailing:
            client.sendall(reply[: len(reply) // 2])
            return False
        elif not ailing:
            client.sendall(reply)
        return True

    def _taken(self, request: bytes) -> str | None:
        """Return what is to go wrong with a request."""
        with self._guard:
            if self._fault is None or self._fault[1] not in request:
                return None
            fault, self._fault = self._fault[0], None
            self.struck.set()
            return fault


def _close(end: socket.socket) -> None:
    with suppress(OSError):
        end.shutdown(socket.SHUT_RDWR)  # wakes the thread that reads or accepts
    end.close()
