"""A state server that is there, and refuses: an outage, as long as time can mend it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from celery_coalesce import StoreUnavailable
from tests.faults.stories import assert_told_once
from tests.integration.sites import Site
from tests.support.journal import Journal
from tests.support.process import HOST, free_port, wait_until

Switch = Callable[[Any], Any]

#: What makes it refuse to write, and what mends that.
REFUSALS: dict[str, tuple[Switch, Switch]] = {
    "OOM": (lambda client: client.config_set("maxmemory", 1), lambda client: client.config_set("maxmemory", 0)),
    "NOREPLICAS": (
        lambda client: client.config_set("min-replicas-to-write", 1),
        lambda client: client.config_set("min-replicas-to-write", 0),
    ),
    "READONLY": (lambda client: client.replicaof(HOST, free_port()), lambda client: client.replicaof("NO", "ONE")),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_server_that_refuses_to_write_keeps_no_key_busy(refusal: str, site: Site, journal: Journal) -> None:
    """Its memory is full, it has too few replicas, it is a replica itself: called, started and ended when it is not."""
    refuse, mend = REFUSALS[refusal]
    worker = site.worker(concurrency=1)
    queue = site.app.tasks["queue"]
    first = queue.delay(journal.key(), 1, gate="g")
    journal.wait("start", timeout=20)
    second = queue.delay(journal.key(), 2)
    held = queue.delay(journal.key("held"), 3)
    with site.state.client() as client:
        refuse(client)
        with pytest.raises(StoreUnavailable, match="refused for now"):
            queue.delay(journal.key("refused"), 4)
        journal.open("g")
        assert first.get(timeout=20) == 1
        wait_until(lambda: "could not be reported yet" in worker.logs(), 20)
        journal.assert_never("start", key="held", within=1)
        assert len(journal.events("start")) == 1
        mend(client)

    assert second.get(timeout=20) == 2
    assert held.get(timeout=20) == 3
    site.wait_idle()
    assert_told_once(journal, runs=2)
    assert_told_once(journal, "held", runs=1)
    assert journal.events("start", key="refused") == []
    assert not journal.events("coalesce_lost")
