"""The servers that a section measures with."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import redis


@dataclass(frozen=True)
class Server:
    """A database of a Redis or Valkey that nobody else uses."""

    url: str
    client: redis.Redis

    def clear(self) -> None:
        """Empty the database."""
        self.client.flushdb()

    def cpu(self) -> float:
        """Return the seconds of CPU time that the server has used."""
        info: Any = self.client.info("cpu")
        return float(info["used_cpu_user"]) + float(info["used_cpu_sys"])

    def memory(self) -> int:
        """Return the bytes that its data takes, buffers of clients and the text of scripts and functions apart."""
        info: Any = self.client.info("memory")
        beside = sum(info.get(name, 0) for name in ("used_memory_scripts_eval", "used_memory_functions"))
        return int(info["used_memory"] - info["mem_clients_normal"] - beside)

    def version(self) -> str:
        """Return what it calls itself."""
        info: Any = self.client.info("server")
        name = info.get("server_name", "redis")
        return f"{name} {info.get(f'{name}_version', info['redis_version'])}"


@contextmanager
def redis_server(given: str | None = None) -> Iterator[Server]:
    """Give an empty database: of the given server, else of one that is started for it."""
    if given is None:
        from tests.support.servers import RedisServer, ValkeyServer

        kind = RedisServer if shutil.which("redis-server") else ValkeyServer
        with kind() as started, started.client() as client:
            with suppress(redis.ResponseError):  # Redis 6.2 does not know it
                # It takes some 20 kB for each command that is called for the first time, counted as data.
                client.config_set("latency-tracking", "no")
            yield Server(started.url(), client)
        return
    with redis.Redis.from_url(given, decode_responses=True) as client:
        if client.dbsize():
            raise SystemExit(f"{given} is not empty: name a database that is, as it is emptied again and again")
        try:
            yield Server(given, client)
        finally:
            client.flushdb()


@contextmanager
def rabbit_server() -> Iterator[str | None]:
    """Give the URL of a RabbitMQ that is started for it, None where it is not installed."""
    from tests.support.rabbit import DEBIAN, RabbitServer

    places = os.pathsep.join([DEBIAN, os.environ.get("PATH", os.defpath)])
    if not (shutil.which("rabbitmq-server", path=places) and shutil.which("epmd", path=places)):
        yield None
        return
    with RabbitServer() as server:
        yield server.url
