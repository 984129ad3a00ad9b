"""A Cluster whose slot moves, and whose nodes die."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from celery_coalesce import StoreUnavailable
from celery_coalesce.engine import engine_of
from tests.faults.stories import assert_told_once
from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.process import wait_until
from tests.support.servers import Migration, ValkeyCluster
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

TAG = "{coalesce}"

pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def cluster() -> Iterator[ValkeyCluster]:
    """Three masters that lose nothing when they are killed."""
    with ValkeyCluster(aof=True) as cluster:
        yield cluster


@pytest.fixture
def make_clustered_app(make_app: MakeApp, cluster: ValkeyCluster) -> Callable[..., HarnessApp]:
    """Make an app whose state is on the cluster, and whose broker is elsewhere."""

    def make(**conf: Any) -> HarnessApp:
        url = cluster.url().replace("redis://", "redis+cluster://")
        return make_app(conf={"coalesce_redis_url": url, "coalesce_lease": 3, "coalesce_redispatch_after": 30, **conf})

    return make


def wait_idle(cluster: ValkeyCluster) -> None:
    """Wait until nothing is left of any key."""

    def left() -> set[str]:
        with cluster.client() as client:
            names = {name.removeprefix(f"{TAG}:") for name in client.scan_iter(count=1000)}
        return names - {"meta", "presence", "history", "seen"}

    wait_until(lambda: not left(), 20, lambda: f"left: {left()}")


class TestASlotThatMoves:
    def test_half_of_it_is_there(
        self,
        make_clustered_app: Callable[..., HarnessApp],
        make_worker: MakeWorker,
        cluster: ValkeyCluster,
        journal: Journal,
    ) -> None:
        """No node has all of a record: TRYAGAIN is an outage, and passes."""
        app = make_clustered_app()
        worker = make_worker(app, concurrency=1)
        queue = app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        held = queue.delay(journal.key("held"), 3)
        migration = Migration(cluster, TAG)
        migration.move(f"{TAG}:meta")
        with pytest.raises(StoreUnavailable, match="refused for now"):
            queue.delay(journal.key("refused"), 1)
        with pytest.raises(StoreUnavailable):
            queue.batch_delay([(journal.key("refused"), 1), (journal.key("refused"), 2)])
        journal.open("g")
        assert first.get(timeout=20) == 1
        wait_until(lambda: "could not be reported yet" in worker.logs(), 20)
        journal.assert_never("start", key="held", within=1)
        assert len(journal.events("start")) == 1

        migration.finish()
        assert second.get(timeout=20) == 2
        assert held.get(timeout=20) == 3
        wait_idle(cluster)
        assert_told_once(journal, runs=2)
        assert_told_once(journal, "held", runs=1)
        assert journal.events("start", key="refused") == []

    def test_triggers_and_runs_go_on(
        self,
        make_clustered_app: Callable[..., HarnessApp],
        make_worker: MakeWorker,
        cluster: ValkeyCluster,
        journal: Journal,
    ) -> None:
        """Key by key it moves under load: every call that was accepted is covered, never two runs at once."""
        app = make_clustered_app()
        make_worker(app)
        queue = app.tasks["queue"]
        keys = [f"k{n}" for n in range(4)]
        accepted: dict[str, int] = dict.fromkeys(keys, -1)
        moved = threading.Event()

        def call() -> None:
            value = 0
            while not moved.is_set() or value % 4:
                with contextlib.suppress(StoreUnavailable):
                    queue.delay(journal.key(keys[value % 4]), value)
                    accepted[keys[value % 4]] = value
                value += 1

        caller = threading.Thread(target=call)
        caller.start()
        try:
            journal.wait("end", count=4, timeout=20)
            migration = Migration(cluster, TAG)
            for name in migration.left():
                migration.move(name)
            migration.finish()
            count = len(journal.events("end"))
            journal.wait("end", count=count + 8, timeout=20)
        finally:
            moved.set()
            caller.join(30)
        wait_idle(cluster)
        assert_no_overlap(journal.events())
        for key in keys:
            # Calls of one key are made one after the other: whatever came later covers what came before.
            assert journal.events("end", key=key)
            last = journal.events("start", key=key)[-1]
            assert last["args"][1] >= accepted[key], key
        assert not journal.events("coalesce_lost")


class TestANodeThatDies:
    def test_its_replica_takes_over(
        self,
        make_clustered_app: Callable[..., HarnessApp],
        make_worker: MakeWorker,
        cluster: ValkeyCluster,
        journal: Journal,
    ) -> None:
        """A run and what waits behind it go on there."""
        owner = cluster.owner(TAG)
        replica = cluster.add_replica(owner)
        app = make_clustered_app()
        make_worker(app, concurrency=1)
        queue = app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        with owner.client() as client:
            seen = client.info("replication")["master_repl_offset"]
        with replica.client() as client:
            wait_until(lambda: client.info("replication")["slave_repl_offset"] >= seen)
        owner.kill()
        journal.open("g")
        assert first.get(timeout=20) == 1
        assert second.get(timeout=30) == 2
        journal.wait("coalesce_drain", timeout=20)
        assert_told_once(journal, runs=2)
        assert not journal.events("coalesce_lost")
        wait_until(lambda: engine_of(app).transitions.show("queue", journal.key()) is None)

    def test_nobody_takes_over_until_it_is_back(
        self,
        make_clustered_app: Callable[..., HarnessApp],
        make_worker: MakeWorker,
        cluster: ValkeyCluster,
        journal: Journal,
    ) -> None:
        """CLUSTERDOWN is an outage, however it comes."""
        owner = cluster.owner(TAG)
        app = make_clustered_app()
        worker = make_worker(app, concurrency=1)
        queue = app.tasks["queue"]
        first = queue.delay(journal.key(), 1, gate="g")
        journal.wait("start", timeout=20)
        second = queue.delay(journal.key(), 2)
        owner.kill()
        with pytest.raises(StoreUnavailable):
            queue.delay(journal.key("away"), 1)
        journal.open("g")
        assert first.get(timeout=20) == 1
        wait_until(lambda: "could not be reported yet" in worker.logs(), 20)
        other = next(node for node in cluster.nodes if node is not owner)
        with other.client() as client:
            wait_until(lambda: client.execute_command("CLUSTER INFO")["cluster_state"] == "fail")
        with pytest.raises(StoreUnavailable):
            queue.delay(journal.key("away"), 1)
        assert len(journal.events("start")) == 1

        owner.start()
        assert second.get(timeout=30) == 2
        journal.wait("coalesce_drain", timeout=20)
        wait_idle(cluster)
        assert_told_once(journal, runs=2)
        assert journal.events("start", key="away") == []
        assert not journal.events("coalesce_lost")


def tried_again(queue: Any, *args: Any) -> Any:
    """Make a call until it is accepted: for a moment after a change of nodes the cluster may be down."""

    def called() -> Any:
        with contextlib.suppress(StoreUnavailable):
            return queue.delay(*args)

    return wait_until(called, 20)


def test_replicas_are_waited_for_where_the_transition_ran(
    make_clustered_app: Callable[..., HarnessApp], make_worker: MakeWorker, cluster: ValkeyCluster, journal: Journal
) -> None:
    """On the node that has the slot, and after it has gone to its replica on that one."""
    owner = cluster.owner(TAG)
    replica = cluster.add_replica(owner)
    app = make_clustered_app(coalesce_wait_replicas=1)
    queue = app.tasks["queue"]
    first = queue.delay(journal.key(), 1)
    replica.pause()
    with pytest.raises(StoreUnavailable, match="0 of them had the change within"):
        queue.delay(journal.key(), 2)
    with pytest.raises(StoreUnavailable, match="0 of them had the change within"):
        queue.batch_delay([(journal.key(), 3), (journal.key(), 3)])
    replica.resume()
    assert tried_again(queue, journal.key(), 4).run_task_id == first.id

    with replica.client() as client:
        wait_until(lambda: client.execute_command("CLUSTER FAILOVER"))
        wait_until(lambda: client.role()[0] == "master", 20)
        wait_until(lambda: int(client.info("replication").get("connected_slaves", 0)) == 1, 20)
    assert tried_again(queue, journal.key(), 5).run_task_id == first.id
    make_worker(app, concurrency=1)
    assert first.get(timeout=20) == 5
    wait_idle(cluster)
    assert_told_once(journal, runs=1)
