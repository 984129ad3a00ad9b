"""Child processes of the tests: watched by pid, always bounded, never outliving the tests.

Every process writes to a log of its own, lives in a temporary directory of its own, and is killed
by the kernel (Linux) when the test process dies in whatever way.
"""

from __future__ import annotations

import atexit
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn

import psutil  # type: ignore[import-untyped,unused-ignore]
import pytest

if TYPE_CHECKING:
    from typing_extensions import Self

ROOT = Path(__file__).resolve().parents[2]
HOST = "127.0.0.1"

# Runs between fork and the real program. A `preexec_fn` would do the same, but is unsafe and
# warned about where the parent has threads, as it has under pytest-xdist.
_EXEC_UNTIL_PARENT_DIES = """
import ctypes, os, signal, sys
PR_SET_PDEATHSIG = 1
ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the test process died before its child was started")
signal.signal(signal.SIGPIPE, signal.SIG_DFL)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ProcessDied(RuntimeError):
    """A process that a test waited for has exited; the message quotes its log."""


class Process:
    """A program that runs until it is stopped, killed or closed; subclasses say how to start it.

    Invariant: a process is in `Process.opened` from its construction until `close()`, which leaves
    the end of its log in `Process.closed`; so nothing is left at exit, and a failed test can show
    every log.
    """

    opened: ClassVar[list[Process]] = []
    closed: ClassVar[list[tuple[str, str]]] = []  # (description, end of log), since the test began
    name = "process"
    start_timeout = 10.0  # seconds
    stop_signal = signal.SIGTERM

    def __init__(self) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{self.name}-"))
        self.log = self.directory / f"{self.name}.log"
        self._popen: subprocess.Popen[bytes] | None = None
        self._descendants: list[psutil.Process] = []
        Process.opened.append(self)

    def command(self) -> list[str]:
        """Return the program and its arguments."""
        raise NotImplementedError

    def environment(self) -> dict[str, str]:
        """Return the environment of the program."""
        return os.environ | {"TMPDIR": str(self.directory)}  # what it leaves there goes with it

    def inherited_fds(self) -> tuple[int, ...]:
        """Return the file descriptors that the program keeps."""
        return ()

    def answers(self) -> bool:
        """Tell whether the program serves; an exception counts as no."""
        return True

    # Life

    def start(self) -> Self:
        """Start the program and return once it is ready."""
        self.launch()
        try:
            self.wait_ready()
        except BaseException:
            self.kill()
            raise
        return self

    def launch(self) -> None:
        """Start the program and return at once; `wait_ready()` does the rest."""
        if self.running:
            raise RuntimeError(f"{self.name} runs already, as {self.pid}")
        if threading.current_thread() is not threading.main_thread():
            # Linux sends PDEATHSIG when the *thread* that forked ends, not when its process does.
            raise RuntimeError("start processes in the main thread; launch() does not block")
        command = self.command()
        if sys.platform == "linux":
            shim = [sys.executable, "-I", "-S", "-c", _EXEC_UNTIL_PARENT_DIES, str(os.getpid())]
            command = shim + command
        with self.log.open("ab") as output:
            self._popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self.environment(),
                cwd=ROOT,
                pass_fds=self.inherited_fds(),
                start_new_session=True,  # Ctrl-C is for pytest, which then closes us in order
            )

    def wait_ready(self) -> None:
        """Wait until the program answers; fail at once, with its log, if it exits."""

        def ready() -> bool:
            if not self.running:
                raise ProcessDied(f"{self.name} exited with {self.returncode}:\n{self.tail()}")
            try:
                return self.answers()
            except Exception:
                return False

        wait_until(ready, self.start_timeout, lambda: f"{self.name} not ready:\n{self.tail()}")

    def signal(self, number: int) -> None:
        """Send a signal to the program, not to its children."""
        self._started().send_signal(number)

    def pause(self) -> None:
        """Freeze the program and its children (SIGSTOP), as a suspended machine would."""
        for process in self._tree():
            with suppress(psutil.NoSuchProcess):
                process.suspend()
                wait_until(partial(_is_stopped, process), 5, "a signal to stop took no effect")

    def resume(self) -> None:
        """Let a paused program and its children go on."""
        for process in reversed(self._tree()):
            with suppress(psutil.NoSuchProcess):
                process.resume()

    def wait(self, timeout: float = 10) -> int:
        """Wait until the program exits by itself, and return its exit code."""
        try:
            return self._started().wait(timeout)
        except subprocess.TimeoutExpired:
            message = f"{self.name} still runs after {timeout} s:\n{self.tail()}"
            raise TimeoutError(message) from None

    def stop(self, timeout: float = 10) -> int | None:
        """Ask the program to end, kill it after `timeout` seconds, and return its exit code."""
        if self.running:
            self.resume()
            self.signal(self.stop_signal)
            try:
                self.wait(timeout)
            except TimeoutError:
                self.kill()
        return self.returncode

    def kill(self) -> None:
        """SIGKILL the program, not its children, and reap it."""
        if self.running:
            self._tree()
            self.signal(signal.SIGKILL)
            self.wait()

    def restart(self) -> Self:
        """Stop the program if it runs, and start it again with the same directory and port."""
        self.stop()
        return self.start()

    def close(self) -> None:
        """Kill the program and what is left of its children, and remove its directory."""
        self.kill()
        for process in self._descendants:
            with suppress(psutil.NoSuchProcess):
                process.kill()  # psutil compares the creation time: never a stranger's pid
        if self in Process.opened:
            Process.opened.remove(self)
            Process.closed.append((repr(self), self.tail()))
        shutil.rmtree(self.directory, ignore_errors=True)

    def __enter__(self) -> Self:
        return self if self.running else self.start()

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    # Looking at it

    @property
    def pid(self) -> int:
        """The process id of the program; it stays the same from start to exit."""
        return self._started().pid

    @property
    def running(self) -> bool:
        """Whether the program was started and has not exited; a paused program is running."""
        return self._popen is not None and self._popen.poll() is None

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal, or None while the program runs."""
        return self._started().poll()

    def child_pids(self) -> list[int]:
        """Return the process ids of all living descendants."""
        return [process.pid for process in self._tree()[1:]]

    def logs(self) -> str:
        """Return everything that the program wrote, over all its restarts."""
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def tail(self, lines: int = 60) -> str:
        """Return the last lines of the log."""
        return "\n".join(self.logs().splitlines()[-lines:])

    def _started(self) -> subprocess.Popen[bytes]:
        if self._popen is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._popen

    def _tree(self) -> list[psutil.Process]:
        """Return the program and its descendants, and remember these for `close()`."""
        if not self.running:
            return []
        program = psutil.Process(self.pid)
        descendants = program.children(recursive=True)
        self._descendants += [p for p in descendants if p not in self._descendants]
        return [program, *descendants]

    def __repr__(self) -> str:
        state = f"pid {self.pid}" if self._popen else "not started"
        state += "" if self.running else ", not running"
        return f"<{type(self).__name__} {self.name} ({state})>"


def _is_stopped(process: psutil.Process) -> bool:
    # A child that was killed a moment ago does nothing any more, too.
    return process.status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)


@atexit.register
def _close_all(owner: int = os.getpid()) -> None:
    if os.getpid() == owner:  # not in a fork that a test made
        for process in reversed(list(Process.opened)):
            process.close()


def wait_until(condition: Callable[[], Any], timeout: float = 10, message: str | Callable[[], str] = "") -> Any:
    """Poll until `condition()` is truthy and return its value; only for what sends no event."""
    pause = threading.Event()
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        if time.monotonic() >= deadline:
            text = message() if callable(message) else message
            raise AssertionError(f"not within {timeout} s: {text or condition}")
        pause.wait(0.01)
    return value


def free_port() -> int:
    """Return a port that nothing listens on, below the range of outgoing connections."""
    # A port from the kernel's own range could be taken by any client while its server restarts.
    for port in random.SystemRandom().sample(range(20000, 32768), 100):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port between 20000 and 32768")


def absent(what: str) -> NoReturn:
    """Skip the test because a service is not installed, or fail it in CI."""
    if os.environ.get("CI", "").lower() in ("1", "true"):
        pytest.fail(f"{what} is not installed, and CI tests everything")
    pytest.skip(f"{what} is not installed")


def require(binary: str, *places: str) -> str:
    """Return the path of a program, looking into `places` before PATH; see `absent()`."""
    search = os.pathsep.join([*places, os.environ.get("PATH", os.defpath)])
    return shutil.which(binary, path=search) or absent(binary)
