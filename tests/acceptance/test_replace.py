"""`Task.replace`: by the same key, by anything else, and a bare `Ignore`."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, chord
from celery.exceptions import ChordError

from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.worker import WorkerProcess


def joined_while_held(app: HarnessApp, journal: Journal, name: str, *args: Any, **options: Any) -> Any:
    """Start a run that waits at the gate "a", and queue another with a follower of its own behind it."""
    task = app.tasks[name]
    task.delay(journal.key(), *args, gate="a")
    journal.wait("start")
    waiting = task.delay(journal.key(), *args)
    joined = task.apply_async((journal.key(), *args), **options)
    assert (waiting.disposition, joined.disposition) == ("queued", "coalesced")
    return waiting, joined


def callbacks(app: HarnessApp, journal: Journal) -> dict[str, Any]:
    """Return a link and an errback that are journalled under the keys "link" and "error"."""
    return {
        "link": app.tasks["collect"].s(key=journal.key("link")),
        "link_error": app.tasks["on_error"].s(key=journal.key("error")),
    }


def test_replacement_by_the_same_task_and_key_is_the_same_run(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """It takes over id and run, and starts once the attempt before has ended."""
    result = app.tasks["replaced_by_itself"].delay(journal.key())

    assert result.get(timeout=20) == 2
    journal.wait("coalesce_drain", timeout=20)
    starts = journal.events("start")
    assert {each["task_id"] for each in starts} == {result.id}
    assert {each["coalesce_run_id"] for each in starts} == {result.run_id}
    assert len(starts) == 3
    assert_no_overlap(journal.events())


def test_replacement_by_another_task_of_the_scope_takes_over(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Another coalesced task of the same scope and key continues the run, before what was queued."""
    first = app.tasks["replaced_by_another"].delay(journal.key(), 1, gate="a")
    journal.wait("start")
    second = app.tasks["shared_a"].delay(journal.key(), 2)
    journal.open("a")

    assert first.get(timeout=20) == 1
    assert second.get(timeout=20) == 2
    assert [(each["task"], each["task_id"]) for each in journal.events("start")] == [
        ("replaced_by_another", first.id), ("shared_b", first.id), ("shared_a", second.id),
    ]  # fmt: skip
    assert_no_overlap(journal.events())


def test_replacement_does_not_start_before_the_body_has_returned(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Runs of one key never overlap by being replaced."""
    for _ in range(5):
        app.tasks["replaced_by_itself"].delay(journal.key())
    journal.wait("coalesce_drain", timeout=20)
    assert_no_overlap(journal.events())


@pytest.mark.parametrize("name", ["replaced_by_itself", "replaced_by_another"])
def test_followers_complete_with_what_takes_over(
    name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """A joined call's link fires once, with the last value."""
    value = 0 if name == "replaced_by_itself" else 42
    expected = 2 if name == "replaced_by_itself" else 42
    _, joined = joined_while_held(app, journal, name, value, **callbacks(app, journal))
    journal.open("a")

    assert joined.get(timeout=20) == expected
    assert journal.wait("start", key="link", timeout=20)["args"] == [expected]
    journal.wait("coalesce_drain", timeout=20)
    journal.assert_never("on_error", within=0.3)
    assert len(journal.events("start", key="link")) == 1


KINDS = {
    "replaced_by_plain": 42,
    "replaced_by_group": [42, 42],
    "replaced_by_chain": 42,
    "replaced_by_chord": [42, 42],
}


@pytest.mark.parametrize("name", KINDS)
def test_replacement_by_something_else_completes_all_callers(
    name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Result, link and followers get the replacement's value; each link fires once."""
    task = app.tasks[name]
    task.delay(journal.key(), 0, gate="a")
    journal.wait("start")
    own = task.apply_async((journal.key(), 42), link=app.tasks["collect"].s(key=journal.key("own")))
    plain = task.delay(journal.key(), 42)
    joined = task.apply_async((journal.key(), 42), **callbacks(app, journal))
    journal.open("a")

    assert own.get(timeout=20) == KINDS[name]
    assert plain.get(timeout=20) == KINDS[name]
    assert joined.get(timeout=20) == KINDS[name]
    journal.wait("end", key="own", timeout=20)
    journal.wait("end", key="link", timeout=20)
    journal.wait("coalesce_drain", key="key", timeout=20)
    journal.assert_never("on_error", within=0.3)
    assert len(journal.events("start", key="own")) == 1
    assert len(journal.events("start", key="link")) == 1


@pytest.mark.parametrize("name", KINDS)
def test_replaced_run_in_a_chain_passes_its_value_on(
    name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """The rest of the chain follows the replacement, also for a call that joined."""
    task, collect = app.tasks[name], app.tasks["collect"]
    task.delay(journal.key(), 0, gate="a")
    journal.wait("start")
    chains = [chain(task.si(journal.key(), 42), collect.s(key=journal.key(f"c{n}"))).apply_async() for n in range(2)]
    journal.open("a")

    assert [result.get(timeout=20) for result in chains] == [KINDS[name]] * 2
    journal.wait("coalesce_drain", key="key", timeout=20)
    assert len(journal.events("start", key="c0")) == 1
    assert len(journal.events("start", key="c1")) == 1


@pytest.mark.parametrize("name", KINDS)
def test_replaced_run_in_a_chord_counts_once(
    name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """A header whose members join each other and are replaced fires its body once."""
    task = app.tasks[name]
    task.delay(journal.key(), 0, gate="a")
    journal.wait("start")
    result = chord([task.si(journal.key(), 42) for _ in range(2)])(app.tasks["collect"].s(key=journal.key("body")))
    journal.open("a")

    assert result.get(timeout=20) == [KINDS[name]] * 2
    journal.wait("end", key="body", timeout=20)
    journal.assert_never("start", within=0.3, key="body", retries=1)
    assert len(journal.events("start", key="body")) == 1


def test_key_goes_on_while_something_else_replaces_the_run(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """A plain replacement holds no slot: the next run starts while it waits."""
    task = app.tasks["replaced_by_plain"]
    first = task.delay(journal.key(), 1, gate="a", plain_gate="plain")
    journal.wait("start")
    second = task.delay(journal.key(), 2)
    journal.open("a")
    journal.wait("start", key="key-plain")

    assert second.get(timeout=20) == 2
    assert not first.ready()
    journal.open("plain")
    assert first.get(timeout=20) == 1


@pytest.mark.parametrize("kind", ["task", "group", "chain", "chain's end", "chord", "chord's body"])
def test_failure_of_the_replacement_is_every_callers(
    kind: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Result, errback and followers get the replacement's exception."""
    waiting, joined = joined_while_held(app, journal, "replaced_by_failure", kind, **callbacks(app, journal))
    journal.open("a")

    for result in (waiting, joined):
        with pytest.raises((RuntimeError, ChordError), match="boom"):
            result.get(timeout=20)
    assert journal.wait("on_error", timeout=20)["failed"] == joined.id
    journal.assert_never("start", within=0.3, key="link")
    assert len(journal.events("on_error")) == 1


def test_ignore_ends_the_run_as_skipped(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A bare `Ignore`: callers and followers get `None`, links fire, the key goes on."""
    waiting, joined = joined_while_held(app, journal, "ignoring", **callbacks(app, journal))
    journal.open("a")

    assert waiting.get(timeout=20) is None
    assert joined.get(timeout=20) is None
    assert journal.wait("start", key="link", timeout=20)["args"] == [None]
    skips = [journal.wait("coalesce_skip", count=n, timeout=20)["outcome"] for n in (1, 2)]
    assert all("skipped" in outcome for outcome in skips)
    journal.wait("coalesce_drain", key="key")
    assert_no_overlap(journal.events())


def test_ignore_in_a_chord_counts_as_none(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """A header that joined an ignored run fires its body."""
    task = app.tasks["ignoring"]
    task.delay(journal.key(), gate="a")
    journal.wait("start")
    result = chord([task.si(journal.key()) for _ in range(2)])(app.tasks["collect"].s(key=journal.key("body")))
    journal.open("a")

    assert result.get(timeout=20) == [None, None]


def test_ignore_keeps_a_state_that_the_body_stored(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`update_state` and `Ignore`, as Celery documents it, leave the stored state alone."""
    result = app.tasks["ignoring_with_a_state"].delay(journal.key())

    journal.wait("coalesce_drain", timeout=20)
    assert (result.state, result.info) == ("CUSTOM", {"why": "because"})


def test_replacement_of_an_eager_run_is_inline(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
    """`.apply()` runs the replacement in place."""
    assert app.tasks["replaced_by_itself"].apply((journal.key(),)).get() == 2
    assert app.tasks["replaced_by_plain"].apply((journal.key(), 42)).get() == 42
