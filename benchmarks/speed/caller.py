"""A process that calls one contender's tasks, told what to do by lines of JSON."""

from __future__ import annotations

import gc
import itertools
import json
import select
import subprocess
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import redis

from benchmarks.speed.contenders import Setup, make_app

if TYPE_CHECKING:
    from typing_extensions import Self

#: What one EVALSHA of the least use would do.
FLOOR = "return {redis.call('SET',KEYS[1],ARGV[1]),redis.call('DEL',KEYS[1]),redis.call('EXISTS',KEYS[1])}"
#: Calls that are made before those that count.
WARM = 20


class Operations:
    """What a caller can be told to do. Times are microseconds per call."""

    def __init__(self, setup: Setup) -> None:
        self._tasks = make_app(setup).tasks
        self._numbers = itertools.count()
        self._client = redis.Redis.from_url(setup.state)
        self._sha = self._client.script_load(FLOOR)

    def floor(self, number: int) -> dict[str, float]:
        """Call EVALSHA."""
        return _timed(lambda: self._client.evalsha(self._sha, 1, "speed.floor", "x"), number)

    def fresh(self, number: int, warm: int = WARM) -> dict[str, float]:
        """Trigger keys that nobody has used."""
        delay = self._tasks["noop"].delay
        return _timed(lambda: delay(self._key()), number, warm)

    def again(self, number: int, warm: int = WARM) -> dict[str, float]:
        """Trigger a key whose run is queued."""
        delay = self._tasks["noop"].delay
        return _timed(lambda: delay("again"), number, warm)

    def batch_fresh(self, number: int) -> dict[str, float]:
        """Trigger fresh keys by a batch."""
        return self._batch([(self._key(),) for _ in range(number)])

    def batch_again(self, number: int) -> dict[str, float]:
        """Trigger a key whose run is queued by a batch."""
        self._tasks["noop"].delay("again")
        return self._batch([("again",)] * number)

    def batch_each_again(self, number: int) -> dict[str, float]:
        """Trigger keys whose runs are queued by a batch."""
        calls = [(self._key(),) for _ in range(number)]
        self._tasks["noop"].batch_delay(calls)
        return self._batch(calls)

    def fill(self, number: int, mark: str) -> None:
        """Enqueue calls of fresh keys, and behind them one that tells when its turn has come."""
        for _ in range(number):
            self._tasks["noop"].delay(self._key())
        self._tasks["last"].delay(mark)

    def trigger(self, task: str, args: list[Any]) -> dict[str, Any]:
        """Call a task; tell when that began."""
        began = time.time()
        result = self._tasks[task].delay(*args)
        return {"at": began, "disposition": str(getattr(result, "disposition", ""))}

    def burst(self, task: str, key: str, number: int, given: list[Any]) -> dict[str, float]:
        """Trigger one key many times, each with its number as the last argument; tell when the last call began."""
        numbers = iter(range(number - 1))
        delay = self._tasks[task].delay
        found = _timed(lambda: delay(key, *given, next(numbers)), number - 1, 0)
        began = time.time()
        delay(key, *given, number - 1)
        return found | {"last": began}

    def batch(self, task: str, number: int) -> None:
        """Trigger the first so many keys."""
        self._tasks[task].batch_delay([(f"key:{each:08}",) for each in range(number)])

    def _key(self) -> str:
        return f"key:{next(self._numbers):08}"

    def _batch(self, calls: list[Any]) -> dict[str, float]:
        found = _timed(lambda: self._tasks["noop"].batch_delay(calls), 1, 0)
        return {name: value / len(calls) for name, value in found.items()}


def _timed(call: Callable[[], Any], number: int, warm: int = WARM) -> dict[str, float]:
    for _ in range(warm):
        call()
    gc.collect()
    used, began = time.process_time(), time.perf_counter()
    for _ in range(number):
        call()
    wall, cpu = time.perf_counter() - began, time.process_time() - used
    return {"wall": 1e6 * wall / number, "cpu": 1e6 * cpu / number}


class Caller:
    """Such a process, as its parent sees it; use as a context manager. It ends with its parent."""

    def __init__(self, setup: Setup) -> None:
        command = [sys.executable, "-m", "benchmarks.speed.caller", setup.dump()]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._process.stdin.close()  # type: ignore[union-attr]
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def __call__(self, operation: str, timeout: float = 120, **options: Any) -> Any:
        """Have it do something, and return what it tells."""
        process = self._process
        print(json.dumps([operation, options]), file=process.stdin, flush=True)
        if not select.select([process.stdout], [], [], timeout)[0]:
            raise TimeoutError(f"{operation} not done in {timeout} s")
        line = process.stdout.readline()  # type: ignore[union-attr]
        if not line:
            raise RuntimeError(f"the caller ended in {operation}, with {process.wait(10)}")
        return json.loads(line)


def main() -> None:
    """Do what is asked until nobody asks."""
    replies, sys.stdout = sys.stdout, sys.stderr
    operations = Operations(Setup.load(sys.argv[1]))
    for line in sys.stdin:
        name, options = json.loads(line)
        print(json.dumps(getattr(operations, name)(**options)), file=replies, flush=True)


if __name__ == "__main__":
    main()
