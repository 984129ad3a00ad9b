"""Celery workers as child processes."""

from __future__ import annotations

import json
import os
import select
import sys
import uuid
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from tests.support.app import BACKEND_VARIABLE, BROKER_VARIABLE, CONF_VARIABLE, HarnessApp
from tests.support.process import ROOT, Process, ProcessDied
from tests.support.ready import FD_VARIABLE

if TYPE_CHECKING:
    from typing_extensions import Self


class WorkerProcess(Process):
    """`celery worker`, of the test app or any other.

    `kill()` kills the parent process alone, as the kernel's OOM killer would; `stop()` is a warm
    shutdown; `pause()` freezes parent and children, `signal(SIGSTOP)` the parent alone.
    """

    name = "worker"
    start_timeout = 30.0

    def __init__(
        self,
        app: str = "tests.support.app",
        *,
        broker: str,
        backend: str | None = None,
        pool: str = "prefork",
        concurrency: int = 2,
        queues: Sequence[str] | None = None,
        hostname: str | None = None,
        events: bool = True,
        include: Sequence[str] = (),
        extra_args: Sequence[str] = (),
        env: Mapping[str, str] | None = None,
        conf: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.app = app
        self.broker = broker
        self.backend = backend
        self.pool = pool
        self.concurrency = concurrency
        self.queues = list(queues or ())
        self.hostname = hostname or f"worker-{uuid.uuid4().hex[:8]}@localhost"
        self.events = events
        self.include = ["tests.support.ready", *include]
        self.extra_args = list(extra_args)
        self.env = dict(env or {})
        self.conf = dict(conf or {})
        self._ready_pipe: tuple[int, int] | None = None

    @classmethod
    def serving(cls, app: HarnessApp, **options: Any) -> Self:
        """Return a worker that is set up as a test app is; `conf=` is added to the app's."""
        conf = app.given["conf"] | options.pop("conf", {})
        return cls(**(app.given | options | {"conf": conf}))

    def command(self) -> list[str]:
        command = [sys.executable, "-m", "celery", "-A", self.app, "worker", "-l", "INFO"]
        command += ["-P", self.pool, "-c", str(self.concurrency), "-n", self.hostname]
        command += ["--without-gossip", "--without-mingle", "-I", ",".join(self.include)]
        if self.queues:
            command += ["-Q", ",".join(self.queues)]
        if self.events:
            command += ["-E"]
        return command + self.extra_args

    def environment(self) -> dict[str, str]:
        environment = super().environment() | {
            BROKER_VARIABLE: self.broker,
            CONF_VARIABLE: json.dumps(self.conf),
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONUNBUFFERED": "1",
        }
        if self.backend:
            environment[BACKEND_VARIABLE] = self.backend
        if self._ready_pipe:
            environment[FD_VARIABLE] = str(self._ready_pipe[1])
        return environment | self.env

    def inherited_fds(self) -> tuple[int, ...]:
        return self._ready_pipe[1:] if self._ready_pipe else ()

    def launch(self) -> None:
        self._close_pipe()
        self._ready_pipe = os.pipe()
        super().launch()
        os.close(self._ready_pipe[1])  # now the worker alone holds it: its death is the end of file
        self._ready_pipe = (self._ready_pipe[0], -1)

    def wait_ready(self) -> None:
        """Wait until the worker consumes; fail at once, with its log, if it dies instead."""
        if self._ready_pipe is None:  # it was ready before
            return
        reader = self._ready_pipe[0]
        if not select.select([reader], [], [], self.start_timeout)[0]:
            raise TimeoutError(f"worker not ready in {self.start_timeout} s:\n{self.tail()}")
        if not os.read(reader, 16):
            raise ProcessDied(f"worker exited with {self.wait()}:\n{self.tail()}")
        self._close_pipe()

    def close(self) -> None:
        super().close()
        self._close_pipe()

    def _close_pipe(self) -> None:
        if self._ready_pipe:
            for fd in self._ready_pipe:
                if fd >= 0:
                    os.close(fd)
            self._ready_pipe = None
