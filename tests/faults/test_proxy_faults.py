"""One request to the state server goes wrong, at each phase of a run, in every way that a network knows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from celery_coalesce import StoreUnavailable
from celery_coalesce.store.scripts import script
from tests.faults.stories import assert_told_once
from tests.integration.sites import LEASE, Site
from tests.support.app import make_app
from tests.support.journal import Journal
from tests.support.process import HOST, wait_until
from tests.support.proxy import FAULTS, TCPProxy
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess


def sha(name: str) -> bytes:
    """Return what a request for a transition contains, be it for the script or for the function."""
    return script(name).sha[:12].encode()


#: Phase -> whose request it is, and what it contains.
PHASES: dict[str, tuple[str, bytes]] = {
    "trigger": ("ours", sha("trigger")),
    "follow-up": ("ours", sha("trigger")),
    "start": ("theirs", sha("start")),
    "check": ("theirs", sha("check")),
    "finish": ("theirs", sha("finish")),
    "retry": ("theirs", sha("retry")),
    "drain": ("theirs", sha("drain")),
}


@pytest.fixture(scope="module")
def site(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[Site]:
    """One state server and one worker for all, which has run every kind of task before."""
    with ExitStack() as stack:
        state = stack.enter_context(ValkeyServer())
        ours = stack.enter_context(TCPProxy(state.port))
        theirs = stack.enter_context(TCPProxy(state.port))
        url = state_server.new_db()
        # Both later than somebody who has got no answer asks again.
        settings = {"coalesce_lease": 3 * LEASE, "coalesce_redispatch_after": 5}
        app = stack.enter_context(
            make_app(url, url, {"coalesce_redis_url": f"redis://{HOST}:{ours.port}/0", **settings})
        )
        conf = {"coalesce_redis_url": f"redis://{HOST}:{theirs.port}/0"}
        worker = stack.enter_context(WorkerProcess.serving(app, concurrency=2, conf=conf))
        site = Site(state, ours, theirs, app, lambda *_: worker)
        warm = Journal(stack.enter_context(journal_server.client()))
        link = app.tasks["collect"].s(key=warm.key("link"))
        app.tasks["queue_retry"].apply_async((warm.key(),), {"times": 1, "value": 1}, link=link).get(timeout=20)
        warm.wait("coalesce_drain", timeout=20)
        yield site


def call(task: Any, *args: Any, **kwargs: Any) -> Any:
    """Make a call, and make it again if nobody knows whether it was accepted."""
    try:
        return task.delay(*args, **kwargs)
    except StoreUnavailable:
        return task.delay(*args, **kwargs)


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("fault", FAULTS)
def test_one_request_goes_wrong(fault: str, phase: str, site: Site, journal: Journal) -> None:
    """A run and its follow-up, whatever was lost on the way: each once, never at once, one drain, nothing left."""
    side, about = PHASES[phase]
    logged = len(site.make_worker().logs())
    proxy: TCPProxy = getattr(site, side)
    retries = int(phase == "retry")
    task = site.app.tasks["queue_retry" if retries else "queue"]
    given = {"times": retries} if retries else {}
    link = site.app.tasks["collect"].s(key=journal.key("link"))

    if phase in ("trigger", "start"):
        proxy.strike(fault, about)
    first = call(task, journal.key(), value=1, gate="g", **given)
    journal.wait("start", timeout=20)
    if phase == "follow-up":
        proxy.strike(fault, about)
    second = call(task, journal.key(), value=2, gate="g", **given)
    linked = task.apply_async((journal.key("linked"),), {"value": 3, "gate": "g", **given}, link=link)
    journal.wait("start", key="linked", timeout=20)
    if phase in ("check", "finish", "retry", "drain"):
        proxy.strike(fault, about)
    journal.open("g", 2 + 1 + 3 * retries)

    assert first.get(timeout=20) == 1
    assert second.get(timeout=20) == 2
    assert linked.get(timeout=20) == 3
    journal.wait("coalesce_drain", key="key", timeout=20)
    journal.wait("coalesce_drain", key="linked", timeout=20)
    journal.wait("end", key="link", timeout=20)
    assert proxy.struck.is_set()
    site.wait_idle()
    assert_told_once(journal, runs=2 * (1 + retries))
    assert_told_once(journal, "linked", runs=1 + retries)
    assert len(journal.events("start", key="link")) == 1
    assert not journal.events("coalesce_lost")
    # Known again, it counts once, and nothing has to be noticed by a clock; but for a call whose caller gave up.
    unknown = fault == "drop reply" and about == sha("trigger")
    counts = {each["coalesce_triggers"] for each in journal.events("start", key="key")}
    assert counts == ({1, 2} if unknown else {1})
    log = site.make_worker().logs()[logged:]
    assert ("was published again" in log) == (fault == "drop reply" and phase == "trigger")
    assert "has not heard of it" not in log


@pytest.mark.parametrize("fault", FAULTS)
def test_one_call_goes_wrong_whose_message_its_script_pushes(
    fault: str, state_server: ValkeyServer, journal: Journal
) -> None:
    """Asked again, it pushes nothing again: one message, one run; and none is left."""
    url = state_server.new_db()
    database = url.rsplit("/", 1)[1]
    with ExitStack() as stack:
        proxy = stack.enter_context(TCPProxy(state_server.port))
        through = f"redis://{HOST}:{proxy.port}/{database}"
        app = stack.enter_context(make_app(through, url))
        stack.enter_context(WorkerProcess.serving(app, broker=url, concurrency=2))
        client = stack.enter_context(state_server.client(int(database)))
        app.tasks["queue"].delay(journal.key("warm"), 0).get(timeout=20)
        proxy.strike(fault, sha("publish"))

        first = call(app.tasks["queue"], journal.key(), value=1, gate="g")
        journal.wait("start", key="key", timeout=20)
        second = call(app.tasks["queue"], journal.key(), value=2)
        journal.open("g", 2)

        assert proxy.struck.is_set()
        assert second.get(timeout=20) == 2
        assert first.get(timeout=20) in (1, 2)
        journal.wait("coalesce_drain", key="key", timeout=20)
        wait_until(lambda: not list(client.scan_iter(match="{coalesce}:rec:*")), 20)
        assert_told_once(journal, runs=2)
        assert client.llen("celery") == 0
        triggers = sum(each["coalesce_triggers"] for each in journal.events("start", key="key"))
        # A caller who gave up, and calls again, has called twice.
        assert triggers == (3 if fault == "drop reply" else 2)
