"""What a batch refuses, before anything is looked up: no server listens here."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery._state import _deregister_app
from celery.result import ResultSet
from kombu.exceptions import EncodeError

from celery_coalesce import (
    CoalescedResult,
    CoalescedTask,
    Constraint,
    Disposition,
    InvalidKey,
    OptionError,
    QueueFull,
    StoreUnavailable,
)
from celery_coalesce.engine import engine_of
from celery_coalesce.signals import coalesce_trigger
from tests.support.process import HOST, free_port


@pytest.fixture
def app() -> Iterator[Celery]:
    """An app whose state server is away."""
    app = Celery("unit", broker="memory://", backend="cache+memory://", set_as_current=False)
    app.conf.coalesce_redis_url = f"redis://{HOST}:{free_port()}/0"
    app.finalize()
    yield app
    app.close()
    _deregister_app(app)


def crawl(org: Any, page: Any = None, tag: Any = None) -> None:
    """Take what the calls pass."""


@pytest.fixture
def task(app: Celery) -> Any:
    """A task with a key, a constraint and a label."""
    return app.task(
        name="tasks.crawl",
        shared=False,
        base=CoalescedTask,
        coalesce_key=lambda org, page, tag: None if org == "exempt" else org,
        coalesce_constraints=Constraint(lambda org, page, tag: page),
        coalesce_labels={"tag": "<tag.name>"},
    )(crawl)


TAG = {"name": "x"}
GOOD: list[tuple[Any, Any]] = [(("a",), {"tag": TAG}), (("b",), {"page": "two", "tag": TAG})]


def test_only_the_store_is_missing(task: Any) -> None:
    """What is valid comes as far as that."""
    with pytest.raises(StoreUnavailable):
        task.batch_apply_async(GOOD)


@pytest.mark.parametrize("position", [0, 1, 2])
@pytest.mark.parametrize(
    ("error", "args", "kwargs"),
    [
        pytest.param(TypeError, ("a", None, TAG, 3), {}, id="too many arguments"),
        pytest.param(TypeError, (), {"tag": TAG}, id="too few"),
        pytest.param(TypeError, ("a",), {"tag": TAG, "pages": 3}, id="unknown"),
        pytest.param(TypeError, ("exempt",), {"pages": 3}, id="unknown, of an exempt call"),
        pytest.param(InvalidKey, (7,), {"tag": TAG}, id="key"),
        pytest.param(InvalidKey, ("",), {"tag": TAG}, id="empty key"),
        pytest.param(InvalidKey, ("a", 7), {"tag": TAG}, id="constraint"),
        pytest.param(InvalidKey, ("a",), {"tag": "no name"}, id="label"),
        pytest.param(EncodeError, ("a",), {"tag": {"name": "x", "more": object()}}, id="arguments"),
        pytest.param(EncodeError, ("exempt",), {"tag": object()}, id="arguments of an exempt call"),
    ],
)
def test_one_invalid_call_refuses_them_all(task: Any, error: Any, args: Any, kwargs: Any, position: int) -> None:
    """Before the state server is asked for, wherever the call stands."""
    calls = [*GOOD]
    calls.insert(position, (args, kwargs))
    with pytest.raises(error) as raised:
        task.batch_apply_async(calls)
    assert not isinstance(raised.value, StoreUnavailable)


@pytest.mark.parametrize(
    "options",
    [
        {"coalesce": "sometimes"},
        {"coalesce_limit": 2},
        {"coalesce_delays": 2},
        {"coalesce_delay": -1},
        {"coalesce": "serialize", "coalesce_delay": 1},
    ],
)
@pytest.mark.parametrize("eager", [False, True])
def test_options_are_validated_for_all(app: Celery, task: Any, options: dict[str, Any], eager: bool) -> None:
    """As those of one call, inline too."""
    app.conf.task_always_eager = eager
    with pytest.raises(OptionError):
        task.batch_apply_async(GOOD, **options)


@pytest.mark.parametrize("args", ["ab", b"ab", 7, None, {"org": "a"}, {"a"}])
def test_an_element_of_batch_delay_is_a_tuple(task: Any, args: Any) -> None:
    """A string is a sequence too, of what nobody meant."""
    with pytest.raises(TypeError, match=r"tasks\.crawl: call 1 of batch_delay is .*; give each call's arguments as a"):
        task.batch_delay([("a",), args])


@pytest.mark.parametrize("call", [("a",), ("a", {}), (("a",), ("b",)), (("a",), {}, {}), "ab", None, {"org": "a"}])
def test_an_element_of_batch_apply_async_is_a_pair(task: Any, call: Any) -> None:
    """Of positional and keyword arguments."""
    with pytest.raises(TypeError, match=r"call 1 of batch_apply_async is .*; give each call as a pair"):
        task.batch_apply_async([*GOOD[:1], call])


def test_one_task_id_can_not_name_many_calls(task: Any) -> None:
    """`None` is no id."""
    with pytest.raises(TypeError, match=r"takes no task_id, got 'id'.*apply_async"):
        task.batch_apply_async(GOOD, task_id="id")
    with pytest.raises(StoreUnavailable):
        task.batch_apply_async(GOOD, task_id=None)


def test_a_task_that_was_refused_is_not_called_in_batches(app: Celery) -> None:
    """Nor once."""
    with pytest.raises(OptionError):
        app.task(name="tasks.bad", shared=False, base=CoalescedTask, coalesce="sometimes")(crawl)
    with pytest.raises(OptionError, match="sometimes"):
        app.tasks["tasks.bad"].batch_delay([("a",)])


def test_nothing_is_reported_of_a_batch_that_is_refused(task: Any) -> None:
    """No call of it has been made."""
    told: list[Any] = []

    def receive(**given: Any) -> None:
        told.append(given)

    coalesce_trigger.connect(receive, weak=False)
    try:
        with pytest.raises(InvalidKey):
            task.batch_delay([("a", None, TAG), ("", None, TAG)])
        with pytest.raises(StoreUnavailable):
            task.batch_delay([("a", None, TAG)])
    finally:
        coalesce_trigger.disconnect(receive)
    assert told == []


class TestWhatIsShared:
    """What calls have in common is looked up once; what is of one call, or of one batch, is nobody else's."""

    @pytest.fixture
    def asked(self, app: Celery, monkeypatch: pytest.MonkeyPatch) -> list[tuple[dict[str, Any], list[bytes]]]:
        """What the state server is asked for: each question, and what comes along."""
        seen: list[tuple[dict[str, Any], list[bytes]]] = []

        def call_many(calls: Any) -> Any:
            seen.extend((json.loads(question), blobs) for _, _, question, *blobs in calls)
            raise StoreUnavailable("away")

        monkeypatch.setattr(engine_of(app).transitions.store, "call_many", call_many)
        return seen

    def test_each_call_has_what_is_its_own(self, task: Any, asked: list[Any]) -> None:
        """Id, arguments, follower, constraints, labels."""
        calls = [((f"key {n}",), {"page": f"page {n}", "tag": {"name": f"tag {n}"}}) for n in range(3)]
        with pytest.raises(StoreUnavailable):
            task.batch_apply_async(calls, link=task.si("linked"), countdown=3)
        ids = [question["task_id"] for question, _ in asked]
        assert len(set(ids)) == 3
        for n, (question, (key, args, call, follower)) in enumerate(asked):
            assert [need["name"] for need in question["needs"]] == [f"page {n}"]
            assert json.loads(question["labels"]) == {"tag": f"tag {n}"}
            assert question["delay"] == 3000
            assert key.decode() == f"key {n}"
            assert json.loads(args.partition(b"\n")[2]) == [[f"key {n}"], calls[n][1]]
            assert json.loads(follower.partition(b"\n")[2])["task_id"] == ids[n]
            assert call == asked[0][1][2]

    def test_a_batch_has_nothing_of_the_one_before(self, app: Celery, task: Any, asked: list[Any]) -> None:
        """Neither its options, nor what the app and the task were set to."""
        for given in ({"countdown": 3, "headers": {"x": 1}, "coalesce_delay": 5}, {}):
            with pytest.raises(StoreUnavailable):
                task.batch_apply_async(GOOD, **given)
            task.ignore_result = True
            task.serializer = "pickle"
        first, second = asked[0], asked[2]
        assert (first[0]["delay"], first[0]["quiet"], first[0]["store"]) == (3000, 5000, True)
        assert second[0]["store"] is False
        assert not {"delay", "quiet"} & second[0].keys()
        assert b'"x"' in first[1][2]
        assert second[1][2] == b""
        assert [blobs[1].partition(b" ")[0] for _, blobs in (first, second)] == [
            b"application/json",
            b"application/x-python-serialize",
        ]


COPIES: list[Callable[[Any], Any]] = [
    lambda value: value,
    copy.copy,
    copy.deepcopy,
    lambda value: pickle.loads(pickle.dumps(value)),
]


@pytest.mark.parametrize("copied", COPIES, ids=["itself", "copy", "deepcopy", "pickle"])
class TestResults:
    def refused(self, app: Celery) -> CoalescedResult:
        """Return the result of a call that was rejected."""
        result = CoalescedResult("own", app=app).described(Disposition.REJECTED, "k", 1)
        return result.refused(QueueFull("tasks.crawl", "k", 1))

    def test_a_rejected_call_has_failed(self, app: Celery, copied: Any) -> None:
        """Nothing is waited for."""
        result = copied(self.refused(app))
        with pytest.raises(QueueFull, match=r"tasks\.crawl: key 'k' has as many"):
            result.get()
        assert (result.ready(), result.failed(), result.state) == (True, True, "FAILURE")
        assert isinstance(result.result, QueueFull)

    def test_it_tells_whoever_waits_for_it(self, app: Celery, copied: Any) -> None:
        """`then`, and a set of results."""
        seen: list[Any] = []
        result = copied(self.refused(app))
        result.then(seen.append)
        assert isinstance(result.get(propagate=False), QueueFull)
        assert seen == [result]
        with pytest.raises(QueueFull):
            ResultSet([copied(self.refused(app))], app=app).join(timeout=1)

    def test_one_that_was_done_once_has_no_value_without_a_stored_one(self, app: Celery, copied: Any) -> None:
        """It will never be there."""
        result = copied(CoalescedResult("own", app=app).described(Disposition.SKIPPED, "k", 1).done())
        assert result.get(timeout=0.1) is None
        assert (result.ready(), result.state) == (True, "SUCCESS")

    def test_one_that_was_done_once_has_the_stored_one(self, app: Celery, copied: Any) -> None:
        """Looked up when it is asked for."""
        result = copied(CoalescedResult("stored", app=app).described(Disposition.SKIPPED, "k", 1).done())
        app.backend.mark_as_done("stored", 7)
        assert result.get(timeout=0.1) == 7

    def test_one_that_is_not_done_is_waited_for(self, app: Celery, copied: Any) -> None:
        """As any result."""
        result = copied(CoalescedResult("other", app=app).described(Disposition.SKIPPED, "k", 1))
        assert (result.ready(), result.state) == (False, "PENDING")
