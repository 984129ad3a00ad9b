"""What a run's own process does for its task's policies: whether to run, steps, set-up; with a worker, and inline."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from celery import Celery

from celery_coalesce import CoalescedTask, LeaseLost, UnknownStep
from celery_coalesce.signals import coalesce_step
from tests.conformance import tb_tasks
from tests.conformance.tb_tasks import STEPS
from tests.integration.sites import Site
from tests.support.app import HarnessApp
from tests.support.app import make_app as _make_app
from tests.support.events import Monitor
from tests.support.journal import Journal
from tests.support.process import wait_until
from tests.support.servers import ValkeyServer
from tests.support.worker import WorkerProcess

MakeApp = Callable[..., HarnessApp]
MakeWorker = Callable[..., WorkerProcess]

SOON = 20  # seconds that anything may take on a busy machine
INCLUDE = ["tests.conformance.tb_tasks"]
NOWHERE = "redis://127.0.0.1:1/0"


@pytest.fixture(scope="module")
def app(state_server: ValkeyServer, journal_server: ValkeyServer) -> Iterator[HarnessApp]:
    """The app of the module's worker."""
    url = state_server.new_db()
    with _make_app(url, url) as app:
        tb_tasks.define(app)
        yield app


@pytest.fixture(scope="module")
def worker(app: HarnessApp) -> Iterator[WorkerProcess]:
    """A prefork worker with the tasks of `tb_tasks`."""
    with WorkerProcess.serving(app, concurrency=3, include=INCLUDE) as worker:
        yield worker


@pytest.fixture
def make_inline(make_app: MakeApp) -> MakeApp:
    """Make an app with the tasks of `tb_tasks` whose broker and state server do not exist."""

    def make(**conf: Any) -> HarnessApp:
        app = make_app(NOWHERE, "cache+memory://", {"coalesce_redis_url": NOWHERE, **conf})
        tb_tasks.define(app)
        return app

    return make


@pytest.fixture
def eager(make_inline: MakeApp) -> HarnessApp:
    """Such an app that is eager."""
    return make_inline(task_always_eager=True)


@contextmanager
def steps_seen() -> Iterator[list[tuple[str | None, float]]]:
    """Collect the steps that `coalesce_step` reports in this process."""
    seen: list[tuple[str | None, float]] = []

    def receive(step: str | None, progress: float, **_: Any) -> None:
        seen.append((step, progress))

    coalesce_step.connect(receive, weak=False)
    try:
        yield seen
    finally:
        coalesce_step.disconnect(receive)


def order(journal: Journal, *, of: str = "coalesce_", key: str = "key") -> list[str]:
    """Return the names of a key's signals, in their order, but for triggers."""
    names = [event["event"] for event in journal.events(key=key)]
    return [name.removeprefix(of) for name in names if name.startswith(of) and name != "coalesce_trigger"]


@pytest.mark.usefixtures("worker")
class TestShouldRun:
    def test_that_raises_fails_the_run(self, app: HarnessApp, journal: Journal) -> None:
        """With its own error, loudly; the key goes on."""
        asked = app.tasks["asked"]
        result = asked.delay(journal.key(), "raise")
        with pytest.raises(LookupError, match="not to be known"):
            result.get(timeout=SOON)
        journal.wait("coalesce_drain", timeout=SOON)
        assert order(journal) == ["start", "error", "drain"]
        assert journal.events("start") == []
        assert asked.delay(journal.key(), "yes").get(timeout=SOON) == "yes"

    def test_a_skipped_run_lets_nothing_rest(self, app: HarnessApp, journal: Journal) -> None:
        """It has done nothing: neither `coalesce_cooldown` nor `coalesce_once` counts from it."""
        for name in ("asked_rests", "asked_once"):
            task, key = app.tasks[name], journal.key(name)
            assert task.delay(key, "no").get(timeout=SOON) is None
            journal.wait("coalesce_drain", key=name, timeout=SOON)
            assert task.delay(key, "yes").get(timeout=SOON) == "yes"
            journal.wait("coalesce_drain", key=name, count=2, timeout=SOON)
            assert order(journal, key=name) == ["start", "skip", "drain", "start", "success", "drain"]

    def test_is_asked_again_by_each_attempt(self, app: HarnessApp, journal: Journal) -> None:
        """A run whose second retry has become pointless ends skipped."""
        result = app.tasks["asked_retry"].delay(journal.key(), 2)
        assert result.get(timeout=SOON) is None
        journal.wait("coalesce_drain", timeout=SOON)
        assert order(journal) == ["start", "start", "start", "skip", "drain"]
        assert len(journal.events("start")) == 2
        assert len(journal.events("asked")) == 3

    def test_is_asked_for_unbound_and_class_based_tasks(self, app: HarnessApp, journal: Journal) -> None:
        """With the arguments that the caller gave, defaults filled in, and never the task itself."""
        for name in ("asked_unbound", "asked_class"):
            task, key = app.tasks[name], journal.key(name)
            assert task.delay(key, "no").get(timeout=SOON) is None
            assert task.delay(key, value="yes").get(timeout=SOON) == "yes"
            asked = [(event["value"], event["gate"]) for event in journal.events("asked", key=name)]
            assert asked == [("no", None), ("yes", None)]
        assert [event["value"] for event in journal.events("unbound")] == ["yes"]

    def test_skips_runs_whose_result_nobody_wants(self, app: HarnessApp, journal: Journal) -> None:
        """Nothing is stored then."""
        result = app.tasks["asked_ignored"].delay(journal.key(), "no")
        journal.wait("coalesce_drain", timeout=SOON)
        assert order(journal) == ["start", "skip", "drain"]
        assert app.backend.get_task_meta(result.id)["status"] == "PENDING"

    def test_is_not_asked_for_an_exempt_call(self, app: HarnessApp, journal: Journal) -> None:
        """That is a plain Celery call."""
        result = app.tasks["asked"].apply_async((journal.key(), "no"), coalesce_key=None)
        assert result.get(timeout=SOON) == "no"
        assert journal.events("asked") == []


class TestShouldRunInline:
    def test_is_asked_by_eager_calls(self, eager: HarnessApp, journal: Journal) -> None:
        """So that an application's tests see what it does."""
        asked = eager.tasks["asked"]
        for call in (asked.delay, lambda *args: asked.apply(args)):
            assert call(journal.key(), "no").get() is None
            assert call(journal.key(), "yes").get() == "yes"
        assert len(journal.events("asked")) == 4
        assert [event["args"][1] for event in journal.events("start")] == ["yes"] * 2
        assert asked.delay(journal.key(), "raise").failed()

    def test_is_asked_once_where_an_eager_body_calls_itself(self, eager: HarnessApp, journal: Journal) -> None:
        """A call of a task as a function is a call of a function."""

        @eager.task(
            name="recursive",
            shared=False,
            bind=True,
            base=CoalescedTask,
            coalesce_key="<key>",
            coalesce_should_run=lambda key, depth: bool(journal.record("asked")) or depth > 0,
        )
        def recursive(self: CoalescedTask, key: str, depth: int) -> int:
            return 1 + self(key, depth - 1) if depth else 1

        assert recursive.delay("k", 3).get() == 4
        assert len(journal.events("asked")) == 1

    def test_is_not_asked_by_a_direct_call(self, eager: HarnessApp, journal: Journal) -> None:
        """It calls the body."""
        assert eager.tasks["asked"](journal.key(), "no") == "no"
        assert journal.events("asked") == []


@pytest.mark.usefixtures("worker")
class TestSteps:
    def test_unknown_step_fails_the_run_with_the_known_ones(self, app: HarnessApp, journal: Journal) -> None:
        """And says so; nothing was stored for it."""
        result = app.tasks["stepping"].delay(journal.key(), ["build", "tset"])
        with pytest.raises(UnknownStep, match="'tset'") as caught:
            result.get(timeout=SOON)
        assert caught.value.known == list(STEPS)
        journal.wait("coalesce_drain", timeout=SOON)
        assert order(journal) == ["start", "step", "error", "drain"]

    def test_failed_run_is_never_complete(self, app: HarnessApp, journal: Journal) -> None:
        """A hundred per cent is a success."""
        result = app.tasks["stepping"].delay(journal.key(), ["build", "deploy"], error="boom")
        with pytest.raises(RuntimeError, match="boom"):
            result.get(timeout=SOON)
        journal.wait("coalesce_drain", timeout=SOON)
        assert [event["progress"] for event in journal.events("coalesce_step")] == ["15.0", "75.0"]

    def test_ignored_run_is_not_left_in_its_step(self, app: HarnessApp, journal: Journal) -> None:
        """A bare `Ignore` ends it skipped, for those who wait for it as well."""
        result = app.tasks["stepping"].delay(journal.key(), ["build"], error="ignore")
        assert result.get(timeout=SOON) is None
        journal.wait("coalesce_drain", timeout=SOON)
        assert order(journal) == ["start", "step", "skip", "drain"]

    def test_ignored_results_leave_only_the_events(self, app: HarnessApp, journal: Journal) -> None:
        """On the bus and as signals."""
        with Monitor(app) as monitor:
            result = app.tasks["stepping_ignored"].delay(journal.key(), ["test"], gate="a")
            event = monitor.wait("coalesce-step", key=journal.key())
            assert (event["step"], event["progress"], event["done"], event["left"]) == (
                "test",
                40.0,
                ["build"],
                ["deploy"],
            )
            assert event["task_id"] == result.id
            assert app.backend.get_task_meta(result.id)["status"] == "PENDING"
            journal.open("a")
            assert monitor.wait("coalesce-step", key=journal.key(), count=2)["progress"] == 100.0

    def test_each_attempt_says_where_it_begins(self, app: HarnessApp, journal: Journal) -> None:
        """A retry is no end; the run is complete once."""
        result = app.tasks["stepping_retry"].delay(journal.key())
        assert result.get(timeout=SOON) == "stepped"
        journal.wait("coalesce_drain", timeout=SOON)
        assert [(event["attempt"], event["progress"]) for event in journal.events("coalesce_step")] == [
            (0, "15.0"),
            (1, "15.0"),
            (1, "75.0"),
            (1, "100.0"),
        ]

    def test_exempt_call_has_progress_too(self, app: HarnessApp, journal: Journal) -> None:
        """It has no run, and its body need not know."""
        result = app.tasks["stepping"].apply_async((journal.key(), ["test"]), {"gate": "a"}, coalesce_key=None)
        journal.wait("stepped", timeout=SOON)
        assert (result.state, result.info["progress"]) == ("PROGRESS", 40.0)
        journal.open("a")
        assert result.get(timeout=SOON) == "stepped"


@pytest.mark.parametrize("backend", ["rpc://", "disabled://"])
def test_steps_do_without_a_backend_that_keeps_results(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal, backend: str
) -> None:
    """Under `rpc://` progress comes before the value; without a backend there are the events."""
    app = make_app(backend=backend)
    tb_tasks.define(app)
    make_worker(app, include=INCLUDE)
    result = app.tasks["stepping"].delay(journal.key(), list(STEPS), gate="a")
    journal.open("a", 3)
    if backend == "rpc://":
        assert result.get(timeout=SOON) == "stepped"
    journal.wait("coalesce_drain", timeout=SOON)
    progress = [event["progress"] for event in journal.events("coalesce_step")]
    assert progress == ["15.0", "40.0", "75.0", "100.0"]
    assert order(journal) == ["start", *["step"] * 4, "success", "drain"]


def test_run_that_has_lost_its_lease_reports_no_step(
    make_app: MakeApp, make_worker: MakeWorker, journal: Journal
) -> None:
    """`step()` raises `LeaseLost` in its body; what the others stored stays."""
    app = make_app(conf={"coalesce_lease": 2, "coalesce_redispatch_after": 2})
    tb_tasks.define(app)
    workers = [make_worker(app, wait=False, include=INCLUDE) for _ in range(2)]
    for worker in workers:
        worker.wait_ready()
    result = app.tasks["stepping"].delay(journal.key(), ["build", "test"], gate="a")
    journal.wait("stepped", timeout=SOON)
    start = journal.wait("start")
    frozen = next(worker for worker in workers if worker.hostname == start["hostname"])
    frozen.pause()
    journal.wait("coalesce_lost", timeout=30)
    with pytest.raises(LeaseLost):
        result.get(timeout=SOON)
    journal.open("a")
    frozen.resume()

    assert journal.wait("end", timeout=SOON)["outcome"] == "LeaseLost"
    wait_until(lambda: "has lost its lease, and reports nothing" in frozen.logs(), SOON)
    assert result.state == "FAILURE"
    assert [event["step"] for event in journal.events("stepped")] == ["build"]
    assert [event["step"] for event in journal.events("coalesce_step")] == ["'build'"]


def test_step_goes_unreported_while_the_state_server_is_away(site: Site, journal: Journal) -> None:
    """Progress is no reason for a run to fail: it goes on, and reports the next step."""
    tb_tasks.define(site.app)
    worker = site.worker(include=INCLUDE)
    result = site.app.tasks["stepping"].delay(journal.key(), list(STEPS), gate="a")
    journal.wait("stepped", step="build", timeout=SOON)
    site.theirs.cut()
    journal.open("a")
    journal.wait("stepped", step="test", timeout=SOON)
    assert result.info["step"] == "build"
    assert "A step of run" in worker.logs()
    site.theirs.heal()
    journal.open("a")
    journal.wait("stepped", step="deploy", timeout=SOON)
    journal.open("a")
    assert result.get(timeout=SOON) == "stepped"
    journal.wait("coalesce_success", timeout=SOON)
    assert [event["step"] for event in journal.events("coalesce_step")] == ["'build'", "'deploy'", "None"]


class TestStepsInline:
    def test_are_checked_and_told_without_any_redis(self, eager: HarnessApp, journal: Journal) -> None:
        """By eager calls with the end, by direct ones without: they are no runs."""
        stepping = eager.tasks["stepping"]
        with steps_seen() as seen:
            assert stepping.delay(journal.key(), ["build", "deploy"]).get() == "stepped"
            assert seen == [("build", 15.0), ("deploy", 75.0), (None, 100.0)]
            del seen[:]
            assert stepping(journal.key(), ["test"]) == "stepped"
            assert seen == [("test", 40.0)]
            del seen[:]
            with pytest.raises(UnknownStep, match="known are: 'build', 'test', 'deploy'"):
                stepping(journal.key(), ["biuld"])
            failed = stepping.delay(journal.key(), ["build", "biuld"])
            assert isinstance(failed.result, UnknownStep)
            assert seen == [("build", 15.0)]

    @pytest.mark.parametrize("stored", [False, True])
    def test_are_stored_where_eager_results_are(self, make_inline: MakeApp, journal: Journal, stored: bool) -> None:
        """`task_store_eager_result`."""
        app = make_inline(task_always_eager=True, task_store_eager_result=stored)
        states: list[tuple[str, Any]] = []

        def look(**_: Any) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that there may be nothing to be read
                meta = app.backend.get_task_meta("own")
            states.append((meta["status"], (meta["result"] or {}).get("progress")))

        coalesce_step.connect(look, weak=False)
        try:
            app.tasks["stepping"].apply_async((journal.key(), ["build"]), task_id="own")
        finally:
            coalesce_step.disconnect(look)
        # The second look is that of the end, before Celery stores the value.
        assert states == [("PROGRESS", 15.0) if stored else ("PENDING", None)] * 2

    def test_none_are_declared(self, eager: HarnessApp, journal: Journal) -> None:
        """No step is known then."""
        task = eager.tasks["queue"]
        with pytest.raises(UnknownStep, match="known are: none"):
            task.coalesce.step("build")


class TestSetUp:
    def test_that_raises_fails_the_run_and_is_tried_again(
        self, app: HarnessApp, make_worker: MakeWorker, journal: Journal
    ) -> None:
        """By the next run of the same process."""
        make_worker(app, include=INCLUDE, concurrency=1, queues=["late"])
        task = app.tasks["prepared_late"]
        failing = task.apply_async((journal.key(),), queue="late")
        with pytest.raises(ConnectionError, match="not set up yet"):
            failing.get(timeout=SOON)
        journal.wait("coalesce_drain", key="key", timeout=SOON)
        assert order(journal) == ["start", "error", "drain"]
        assert journal.events("start") == []
        calls = [task.apply_async((journal.key(f"key {n}"),), queue="late") for n in range(2)]
        assert [call.get(timeout=SOON)["calls"] for call in calls] == [2, 2]

    def test_happens_once_for_all_threads(self, app: HarnessApp, make_worker: MakeWorker, journal: Journal) -> None:
        """Of a threads pool, however many runs are the first."""
        make_worker(app, include=INCLUDE, pool="threads", concurrency=4, queues=["threads"])
        task = app.tasks["prepared"]
        results = [task.apply_async((journal.key(f"key {n}"), "a"), queue="threads") for n in range(4)]
        for number in range(4):
            journal.wait("start", key=f"key {number}", timeout=SOON)
        journal.open("a", 4)
        values = [result.get(timeout=SOON) for result in results]
        assert len({value["thread"] for value in values}) == 4
        assert {(value["id"], value["calls"]) for value in values} == {(values[0]["id"], 1)}

    @pytest.mark.usefixtures("worker")
    def test_is_there_for_exempt_calls(self, app: HarnessApp, journal: Journal) -> None:
        """Their body is the same."""
        value = app.tasks["prepared"].apply_async((journal.key(),), coalesce_key=None).get(timeout=SOON)
        assert value["pid"] == value["ran_in"]

    def test_is_there_inline(self, eager: HarnessApp, journal: Journal) -> None:
        """For eager and direct calls, once for this process."""
        prepared = eager.tasks["prepared"]
        values = [prepared.delay(journal.key()).get(), prepared(journal.key()), prepared.apply((journal.key(),)).get()]
        assert len({value["id"] for value in values}) == 1
        assert eager.tasks["queue"].coalesce.setup is None

    def test_error_of_the_set_up_is_not_taken_for_a_missing_attribute(self, eager: Celery) -> None:
        """Where the body is called directly, and asks for it itself."""

        def broken() -> None:
            object().missing  # type: ignore[attr-defined]  # noqa: B018

        @eager.task(name="broken", shared=False, bind=True, base=CoalescedTask, coalesce_setup=broken)
        def body(self: CoalescedTask) -> Any:
            return self.coalesce.setup

        with pytest.raises(RuntimeError, match="coalesce_setup raised AttributeError"):
            body()
        assert isinstance(body.delay().result, AttributeError)
