"""`link`, `link_error`, chain, group and chord: every id resolves, and every callback fires once."""

from __future__ import annotations

from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError
from celery.result import AsyncResult

from tests.support.app import HarnessApp
from tests.support.journal import Journal, assert_no_overlap
from tests.support.worker import WorkerProcess


@pytest.fixture
def held(app: HarnessApp, worker: WorkerProcess, journal: Journal) -> AsyncResult:
    """A run of the key "key" that waits at the gate "held"."""
    result = app.tasks["queue"].delay(journal.key(), "held", gate="held")
    journal.wait("start", key="key", timeout=20)
    return result


def collect(app: HarnessApp, journal: Journal, key: str) -> Any:
    """Return a callback that is journalled under a key."""
    return app.tasks["collect"].s(key=journal.key(key))


def on_error(app: HarnessApp, journal: Journal, key: str = "error") -> Any:
    """Return an errback that is journalled under a key."""
    return app.tasks["on_error"].s(key=journal.key(key))


def fired(journal: Journal, *keys: str) -> list[int]:
    """Return how often the callbacks of some keys have started."""
    return [len(journal.events("start", key=key)) for key in keys]


def drained(journal: Journal, key: str = "key") -> None:
    """Wait until a key is idle."""
    journal.wait("coalesce_drain", key=key, timeout=20)


class TestCallbacks:
    def test_links_of_all_calls_fire_once_with_the_covering_value(
        self, app: HarnessApp, journal: Journal, held: AsyncResult
    ) -> None:
        """Whether a call made the run or joined it, its link is called with the run's value."""
        task = app.tasks["queue"]
        results = [
            task.apply_async((journal.key(), value), link=collect(app, journal, f"link{value}")) for value in range(4)
        ]
        assert [result.coalesced for result in results] == [False, True, True, True]
        assert len({result.id for result in results}) == 4
        journal.open("held")

        assert [result.get(timeout=20) for result in results] == [3] * 4
        for n in range(4):
            assert journal.wait("start", key=f"link{n}", timeout=20)["args"] == [3]
        drained(journal)
        assert fired(journal, "link0", "link1", "link2", "link3") == [1] * 4
        assert len(journal.events("start", key="key")) == 2

    def test_several_links_of_one_call_all_fire(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """A list of links, with a group among them, fires as a whole."""
        task = app.tasks["queue"]
        task.delay(journal.key(), 1)
        grouped = group(collect(app, journal, "c"), collect(app, journal, "d"))
        joined = task.apply_async(
            (journal.key(), 2), link=[collect(app, journal, "a"), collect(app, journal, "b"), grouped]
        )
        journal.open("held")

        assert joined.get(timeout=20) == 2
        for key in "abcd":
            assert journal.wait("start", key=key, timeout=20)["args"] == [2]
        drained(journal)
        assert fired(journal, *"abcd") == [1] * 4

    def test_link_is_a_child_of_the_call_that_brought_it(
        self, app: HarnessApp, journal: Journal, held: AsyncResult
    ) -> None:
        """Root and parent of a callback are its own call, not the run that covered it."""
        task = app.tasks["queue"]
        task.delay(journal.key(), 1)
        link = app.tasks["tell"].si(journal.key("told"))
        joined = task.apply_async((journal.key(), 2), link=link)
        journal.open("held")

        told = journal.wait("tell", timeout=20)
        assert (told["root_id"], told["parent_id"]) == (joined.id, joined.id)

    def test_errbacks_of_all_calls_fire_once_with_their_own_id(
        self, app: HarnessApp, journal: Journal, held: AsyncResult
    ) -> None:
        """A failing run calls every caller's errbacks, old style and new, and no links."""
        task = app.tasks["queue"]
        calls = [
            task.apply_async(
                (journal.key(),),
                {"error": "boom"},
                link=collect(app, journal, "link"),
                link_error=[
                    on_error(app, journal, f"old{n}"),
                    app.tasks["errback"].s(key=journal.key(f"new{n}")),
                ],
            )
            for n in range(3)
        ]
        journal.open("held")

        for n, call in enumerate(calls):
            with pytest.raises(RuntimeError, match="boom"):
                call.get(timeout=20)
            assert journal.wait("on_error", key=f"old{n}", timeout=20)["failed"] == call.id
            new = journal.wait("errback", key=f"new{n}", timeout=20)
            assert (new["failed"], "boom" in new["exception"]) == (call.id, True)
        drained(journal)
        journal.assert_never("start", within=0.3, key="link")
        assert len(journal.events("on_error")) == len(journal.events("errback")) == 3

    def test_broken_callback_of_one_call_is_not_anothers_loss(
        self, app: HarnessApp, journal: Journal, held: AsyncResult
    ) -> None:
        """A link that can not be sent fails its own call alone, and the key goes on."""
        task = app.tasks["queue"]
        task.delay(journal.key(), 1)
        unroutable = app.signature("nowhere", kwargs={"x": 1}, options={"serializer": "no-such"})
        broken = task.apply_async((journal.key(), 2), link=unroutable)
        whole = task.apply_async((journal.key(), 3), link=collect(app, journal, "link"))
        journal.open("held")

        assert whole.get(timeout=20) == 3
        journal.wait("end", key="link", timeout=20)
        drained(journal)
        # Celery stores the failure of a task whose link can not be sent.
        with pytest.raises(Exception, match="no-such"):
            broken.get(timeout=5)

    def test_link_that_triggers_the_same_key_comes_after(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A run's own link, back to its key, is a run of its own after it."""
        task = app.tasks["queue"]
        first = task.apply_async((journal.key(), 1), link=task.si(journal.key(), 2))

        assert first.get(timeout=20) == 1
        journal.wait("end", count=2, key="key", timeout=20)
        drained(journal)
        assert_no_overlap(journal.events())

    @pytest.mark.parametrize("name", ["skip", "queue", "serialize"])
    def test_link_is_never_skipped_by_its_own_run(
        self, name: str, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """What a run's links call of its own key is never answered with that run."""
        task = app.tasks[name]
        task.apply_async((journal.key(), 1), link=task.si(journal.key(), 2))

        journal.wait("end", count=2, key="key", timeout=20)
        drained(journal)
        assert [each["args"][1] for each in journal.events("start")] == [1, 2]


class TestChain:
    def test_chains_that_meet_on_one_key_all_go_on(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """Each chain's next step is called once, with the covering run's value."""
        task, multiply = app.tasks["queue"], app.tasks["multiply"]
        results = [
            chain(task.si(journal.key(), n), multiply.s(10), collect(app, journal, f"end{n}")).apply_async()
            for n in range(3)
        ]
        journal.open("held")

        assert [result.get(timeout=20) for result in results] == [20] * 3
        assert [result.parent.get(timeout=20) for result in results] == [20] * 3
        assert [result.parent.parent.get(timeout=20) for result in results] == [2] * 3
        drained(journal)
        assert fired(journal, "end0", "end1", "end2") == [1] * 3

    def test_coalesced_steps_in_the_middle_take_the_value_before(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A coalesced step works on what the step before returned, and passes its own on."""
        result = chain(
            app.tasks["collect"].s("x", key=journal.key("before")),
            app.tasks["tell"].si(journal.key("mid")),
            collect(app, journal, "after"),
        ).apply_async()

        told = result.get(timeout=20)
        assert told == {"told": result.parent.id}

    def test_chain_of_one_key_runs_in_order(self, app: HarnessApp, worker: WorkerProcess, journal: Journal) -> None:
        """Steps of the same key follow each other."""
        task = app.tasks["queue"]
        result = chain(task.si(journal.key(), n) for n in range(4)).apply_async()

        assert result.get(timeout=20) == 3
        drained(journal)
        assert [each["args"][1] for each in journal.events("start")] == [0, 1, 2, 3]
        assert_no_overlap(journal.events())

    def test_failing_run_ends_all_chains(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """The steps after it never run, their ids fail, and the chains' errbacks fire once each."""
        task = app.tasks["queue"]
        results = [
            chain(task.si(journal.key(), error="boom"), collect(app, journal, "next"))
            .on_error(on_error(app, journal, f"e{n}"))
            .apply_async()
            for n in range(2)
        ]
        journal.open("held")

        for n, result in enumerate(results):
            with pytest.raises(RuntimeError, match="boom"):
                result.parent.get(timeout=20)
            with pytest.raises(RuntimeError, match="boom"):
                result.get(timeout=20)
            journal.wait("on_error", key=f"e{n}", timeout=20)
        drained(journal)
        assert fired(journal, "next") == [0]
        assert len(journal.events("on_error")) == 2

    def test_group_after_a_coalesced_step_starts_once(
        self, app: HarnessApp, journal: Journal, held: AsyncResult
    ) -> None:
        """`task | group | task`: the group is upgraded to a chord, for a joined call, too."""
        task, multiply = app.tasks["queue"], app.tasks["multiply"]
        results = [
            (
                task.si(journal.key(), n) | group(multiply.s(2), multiply.s(3)) | collect(app, journal, f"b{n}")
            ).apply_async()
            for n in (4, 5)
        ]
        journal.open("held")

        assert [result.get(timeout=20) for result in results] == [[10, 15]] * 2
        assert fired(journal, "b4", "b5") == [1, 1]


class TestGroup:
    def test_every_member_of_a_group_resolves(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """Members of one key are answered by the run that covers them."""
        result = group(app.tasks["queue"].s(journal.key(), n) for n in range(5)).apply_async()
        journal.open("held")

        assert result.get(timeout=20) == [4] * 5
        drained(journal)
        assert len(journal.events("start", key="key")) == 2

    def test_group_result_can_be_saved_and_restored(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """`GroupResult.save()` and `restore()` keep the ids."""
        saved = group(app.tasks["queue"].s(journal.key(), n) for n in range(2)).apply_async()
        saved.save()
        restored = app.GroupResult.restore(saved.id)
        journal.open("held")

        assert restored.get(timeout=20) == [1, 1]

    def test_group_of_failing_calls_all_fail(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """Every member gets the failure."""
        result = group(app.tasks["queue"].s(journal.key(), error="boom") for _ in range(3)).apply_async()
        journal.open("held")

        for member in result.children:
            with pytest.raises(RuntimeError, match="boom"):
                member.get(timeout=20)


class TestChord:
    def test_body_fires_once_with_all_values(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """Duplicates among the members count one each, and run once."""
        task = app.tasks["queue"]
        header = [task.s(journal.key(), 1), task.s(journal.key("other"), 2), task.s(journal.key(), 3)]
        result = chord(header)(collect(app, journal, "body"))
        journal.assert_never("start", within=0.3, key="body")
        journal.open("held")

        assert result.get(timeout=20) == [3, 2, 3]
        assert [member.get(timeout=20) for member in result.parent.children] == [3, 2, 3]
        drained(journal)
        journal.wait("end", key="body", timeout=20)
        assert fired(journal, "body") == [1]
        assert len(journal.events("start", key="key")) == 2

    def test_chords_that_meet_on_one_key_both_fire(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """Two chords with members of the same key."""
        task = app.tasks["queue"]
        results = [
            chord([task.s(journal.key(), n), task.s(journal.key(), n)])(collect(app, journal, f"body{n}"))
            for n in range(2)
        ]
        journal.open("held")

        assert [result.get(timeout=20) for result in results] == [[1, 1], [1, 1]]
        drained(journal)
        assert fired(journal, "body0", "body1") == [1, 1]

    def test_members_with_links_and_plain_members_mix(
        self, app: HarnessApp, journal: Journal, held: AsyncResult
    ) -> None:
        """A chord of coalesced members, chains that begin with them and plain tasks."""
        task, multiply = app.tasks["queue"], app.tasks["multiply"]
        header = [
            task.s(journal.key(), 5),
            multiply.s(2, 3),
            chain(task.si(journal.key(), 7), multiply.s(2)),
        ]
        result = chord(header)(collect(app, journal, "body"))
        journal.open("held")

        assert result.get(timeout=20) == [7, 6, 14]

    def test_failing_run_fails_the_chord_once(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """The body's id gets a ChordError, and its errback is called once."""
        task = app.tasks["queue"]
        header = [task.s(journal.key(), error="boom") for _ in range(3)]
        result = chord(header)(collect(app, journal, "body").on_error(on_error(app, journal)))
        journal.open("held")

        with pytest.raises(ChordError, match="boom"):
            app.AsyncResult(result.id).get(timeout=20)
        drained(journal)
        assert journal.wait("on_error", timeout=20)["failed"] == result.id
        assert fired(journal, "body") == [0]
        for member in result.parent.children:
            with pytest.raises(RuntimeError, match="boom"):
                member.get(timeout=20)

    def test_coalesced_body_and_chord_in_a_chain(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A body may coalesce, and be followed."""
        multiply, task = app.tasks["multiply"], app.tasks["queue"]
        result = (group(multiply.s(1, 2), multiply.s(2, 2)) | task.si(journal.key(), 9) | multiply.s(10)).apply_async()

        assert result.get(timeout=20) == 90

    def test_members_that_ignore_their_results_still_count(
        self, app: HarnessApp, worker: WorkerProcess, journal: Journal
    ) -> None:
        """A chord of members that join each other waits for all, whatever their mode."""
        for name in ("skip", "serialize"):
            key = journal.key(name)
            header = [app.tasks[name].s(key, n) for n in range(3)]
            result = chord(header)(collect(app, journal, f"body-{name}"))
            values = result.get(timeout=20)
            assert len(values) == 3
            assert set(values) <= {0, 1, 2}
            journal.wait("end", key=f"body-{name}")
            assert fired(journal, f"body-{name}") == [1]

    def test_nested_chords_and_groups_resolve(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """A chord within a chord's header, over one key."""
        task = app.tasks["queue"]
        inner = chord(
            [task.s(journal.key(), 1), task.s(journal.key(), 2)], app.tasks["collect"].s(key=journal.key("inner"))
        )
        result = chord([inner, task.s(journal.key(), 3)])(collect(app, journal, "outer"))
        journal.open("held")

        assert result.get(timeout=20) == [[3, 3], 3]
        assert fired(journal, "inner", "outer") == [1, 1]

    def test_thousand_duplicates_fire_the_body_once(self, app: HarnessApp, journal: Journal, held: AsyncResult) -> None:
        """More followers than one slice of them."""
        task = app.tasks["queue"]
        result = chord([task.s(journal.key(), n) for n in range(250)])(app.tasks["tell"].si(journal.key("body")))
        journal.open("held")

        assert result.get(timeout=30) == {"told": result.id}
        drained(journal)
        assert fired(journal, "body") == [1]
        assert len(journal.events("start", key="key")) == 2


def test_every_id_resolves_whatever_the_covering_run_became(
    app: HarnessApp, worker: WorkerProcess, journal: Journal
) -> None:
    """Calls with an id of their own resolve under that id, under `skip` as well."""
    task = app.tasks["skip"]
    first = task.delay(journal.key(), 1, gate="a")
    journal.wait("start")
    joined = [task.apply_async((journal.key(), 2), task_id=f"{journal.name}-{n}") for n in range(3)]
    assert {each.disposition for each in joined} == {"skipped"}
    assert [each.id for each in joined] == [f"{journal.name}-{n}" for n in range(3)]
    journal.open("a")

    assert [each.get(timeout=20) for each in [first, *joined]] == [1] * 4
    assert app.AsyncResult(f"{journal.name}-1").get(timeout=5) == 1
