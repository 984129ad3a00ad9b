"""A store whose clock stands still until a test moves it; but for what tells the time its scripts are the real ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

import redis

from celery_coalesce.keys import Names
from celery_coalesce.store.redis import RedisStore
from celery_coalesce.store.scripts import script

TIME = "redis.call('TIME')"


class ClockedStore(RedisStore):
    """Transitions that read their time from a hash of the test's.

    Args:
        client: The client.
        names: The names of everything in Redis.

    Attributes:
        expires: Whether the server forgets what has a time to live. It does so by its own clock, which goes on.
    """

    def __init__(self, client: redis.Redis, names: Names) -> None:
        super().__init__(lambda: client, names, "test server")
        self._test_client = client
        self.expires = True
        self._texts: dict[str, str] = {}
        seconds, micros = client.time()  # type: ignore[misc]
        self.set(seconds * 1000 + micros // 1000)

    @cached_property
    def _name(self) -> str:
        return f"clock:{self.names.namespace}"

    def set(self, milliseconds: int) -> None:
        """Set the clock."""
        self.now = milliseconds
        fields = {"s": milliseconds // 1000, "us": milliseconds % 1000 * 1000}
        self._test_client.hset(self._name, mapping=fields)  # type: ignore[arg-type]
        self._test_client.expire(self._name, 600)

    def call(self, script_name: str, keys: Sequence[str], *argv: str | bytes | int) -> Any:
        """Run a transition at the clock's time."""
        if script_name not in self._texts:
            asked = f"redis.call('HMGET', '{self._name}', 's', 'us')"
            text = script(script_name).text.replace(TIME, asked)
            self._texts[script_name] = text if self.expires else re.sub("'PEXPIRE(AT)?'", "'TOUCH'", text)
        with self._refusals:
            return self._test_client.eval(self._texts[script_name], len(keys), *keys, *argv)  # type: ignore[arg-type]
