"""Waiting until replicas have what a transition has changed.

``WAIT`` asks for the last write of its own connection, and on newer servers (Valkey, Redis 7.2 and later) answers at
once if that has written nothing. A transition that is repeated because its first answer was lost writes nothing. So a
write of no consequence goes along: replicas that have it have all that came before it, whoever wrote that.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from redis.cluster import RedisCluster
from redis.exceptions import ClusterError, MovedError, RedisError

from .clients import Client
from .wire import Command

__all__ = ["WAIT_FOR", "connected", "piped", "sent_and_kept"]

Ask = Callable[[Sequence[Command]], list[Any]]

#: Seconds that replicas are waited for: less than an answer of the server may take. The gate waits as well, so the
#: worker's event loop may be held up for so long; once, as the heartbeat then finds out when replicas are back.
WAIT_FOR = 1.0
#: How often a command is sent on to the node that a Cluster's slot has moved to.
MOST_MOVES = 3


def connected(client: Client, key: str) -> int:
    """Return how many replicas the server of a key has."""
    server = _server_of(client, key) if isinstance(client, RedisCluster) else client
    return int(server.info("replication").get("connected_slaves", 0))


def sent_and_kept(
    client: Client, commands: Sequence[Command], *, meta: str, replicas: int, ask: Ask | None
) -> tuple[list[Any], int]:
    """Run commands in one round trip, and wait for replicas in the same.

    Args:
        client: The client.
        commands: Commands, all of whose keys are in one slot.
        meta: A hash in that slot.
        replicas: How many replicas are waited for.
        ask: Sends commands to the server; ``None`` of a Cluster, where there are several.

    Returns:
        The commands' replies, errors among them, and how many replicas have all that was written.

    Raises:
        RedisError: The server could not be asked.
    """
    wait = (("HSET", meta, "kept", ""), ("WAIT", replicas, int(WAIT_FOR * 1000)))
    if ask is not None:
        return _counted(ask((*commands, *wait)))
    # RedisCluster's own pipeline has no place for a command without a key, and it has to reach this very node.
    for _ in range(MOST_MOVES):
        try:
            replies = piped(_server_of(client, meta), (*commands, *wait))
        except RedisError:
            # As RedisCluster does with its own commands (redis-py 6.4-8.1): another node may have the slot by now.
            client.nodes_manager.initialize()
            raise
        if not isinstance(replies[0], MovedError):
            return _counted(replies)
        client.nodes_manager.initialize()
    raise ClusterError(f"the slot of {meta} has moved {MOST_MOVES} times")


def _server_of(client: Client, key: str) -> Client:
    return client.get_redis_connection(client.get_node_from_key(key))


def piped(client: Client, commands: Sequence[Command]) -> list[Any]:
    """Run commands in one round trip by redis-py's own means; return their replies, the refusals among them."""
    pipeline = client.pipeline(transaction=False)
    for command in commands:
        # ClusterPipeline.evalsha (redis-py 6.4-8.1) refuses: it can not know that all keys have one slot.
        pipeline.execute_command(*command)
    replies: list[Any] = pipeline.execute(raise_on_error=False)
    return replies


def _counted(replies: list[Any]) -> tuple[list[Any], int]:
    *answers, written, there = replies
    for reply in (written, there):
        # Should only these be refused, nothing is known of the others' changes.
        if isinstance(reply, Exception) and not isinstance(answers[0], Exception):
            raise reply
    return answers, there if isinstance(there, int) else 0
