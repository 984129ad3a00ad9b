"""Values that travel: between layers, through pickles, and through a request's headers."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery
from celery.exceptions import WorkerLostError

import celery_coalesce
from celery_coalesce import (
    CoalescedResult,
    Disposition,
    InvalidKey,
    LeaseLost,
    OptionError,
    QueueFull,
    RunMeta,
    SettingError,
    StoreError,
    StoreUnavailable,
    TriggerMeta,
)
from celery_coalesce.records import Lease
from celery_coalesce.states import RunState

META = RunMeta(
    key="org:7", scope="tasks.org", type="key", name="tasks.org", task_id="id", state_id="abc", session_id=10,
    run_id=11, run_index=2, attempt=1, token=12, triggers=3, labels={"tenant": "7"},
)  # fmt: skip
TRIGGER = TriggerMeta(
    key="org:7", scope="tasks.org", name="tasks.org", task_id="id", state_id="abc",
    disposition=Disposition.COALESCED, run_id=11, run_task_id="other", run_state=RunState.PENDING,
)  # fmt: skip
LEASE = Lease(
    state="abc", run="11", task_id="id", task="tasks.org", attempt=1, token="12", session="10", index=2, triggers=3,
    key="org:7", scope="tasks.org", owner="w@h/1/a", args=b"secret", expires=5, hostname="w@h", monitored=True,
)  # fmt: skip

COPIES: list[Callable[[Any], Any]] = [
    lambda value: pickle.loads(pickle.dumps(value)),
    copy.copy,
    copy.deepcopy,
]


@pytest.mark.parametrize("copied", COPIES, ids=["pickle", "copy", "deepcopy"])
class TestCopies:
    @pytest.mark.parametrize("value", [META, TRIGGER, LEASE], ids=lambda value: type(value).__name__)
    def test_records_survive(self, copied: Any, value: Any) -> None:
        """Equal, and still frozen."""
        other = copied(value)
        assert other == value
        with pytest.raises(AttributeError):
            other.key = "other"

    def test_a_result_survives_with_what_became_of_the_call(self, copied: Any) -> None:
        """As a Celery result does."""
        with Celery("unit", broker="memory://", backend="cache+memory://", set_as_current=False) as app:
            result = CoalescedResult("own", app=app).described(Disposition.COALESCED, "org:7", 11, "runs")
            other = copied(result)
            assert isinstance(other, CoalescedResult)
            assert (other.id, other.disposition, other.key) == ("own", Disposition.COALESCED, "org:7")
            assert (other.run_id, other.run_task_id, other.coalesced) == (11, "runs", True)
            assert other == result

    @pytest.mark.parametrize(
        "error",
        [
            OptionError("t", "coalesce", "x", "is bad", "do better"),
            SettingError("coalesce_lease", 0, "is bad", "do better"),
            InvalidKey("t", 7, "is bad"),
            QueueFull("t", "k", 11),
            LeaseLost("lost"),
            StoreError("refused"),
            StoreUnavailable("away"),
        ],
        ids=lambda error: type(error).__name__,
    )
    def test_errors_survive(self, copied: Any, error: Exception) -> None:
        """With their message and values: they pass through pools and result backends."""
        other = copied(error)
        assert type(other) is type(error)
        assert str(other) == str(error)
        own = {name: value for name, value in vars(error).items() if not name.startswith("_")}
        assert {name: getattr(other, name) for name in own} == own


class TestErrors:
    def test_every_error_is_of_the_tree(self) -> None:
        """Callers branch on it."""
        errors = [getattr(celery_coalesce, name) for name in celery_coalesce.__all__]
        for each in errors:
            if isinstance(each, type) and issubclass(each, Exception):
                assert issubclass(each, celery_coalesce.CoalesceError)

    def test_lost_is_what_celery_knows_as_lost(self) -> None:
        """`except WorkerLostError` catches a lost lease, and not a store that is away."""
        assert issubclass(LeaseLost, WorkerLostError)
        assert not issubclass(StoreUnavailable, WorkerLostError)

    def test_a_full_queue_says_what_to_do(self) -> None:
        """With key and task."""
        text = str(QueueFull("t", "org:7", 11))
        assert "t: key 'org:7'" in text
        assert 'use coalesce_overflow="merge"' in text


class TestRunMeta:
    def test_its_values_are_plain(self) -> None:
        """For events and logs."""
        assert json.loads(json.dumps(META.as_dict())) == META.as_dict()
        assert META.as_dict()["is_rerun"] is True
        assert json.loads(json.dumps(TRIGGER.as_dict())) == TRIGGER.as_dict()

    def test_a_first_run_is_no_rerun(self) -> None:
        """Index 0."""
        assert not RunMeta(**{**META.__dict__, "run_index": 0}).is_rerun

    def test_a_lease_gives_it(self) -> None:
        """Numbers are numbers again."""
        meta = RunMeta.of(LEASE)
        assert (meta.session_id, meta.run_id, meta.run_index, meta.token) == (10, 11, 2, 12)
        assert meta.type == "key"

    def test_it_can_not_be_changed(self) -> None:
        """Every receiver gets the same."""
        with pytest.raises(AttributeError):
            META.key = "x"  # type: ignore[misc]


class TestLease:
    def test_it_travels_in_a_header_without_its_arguments(self) -> None:
        """Plain values, which survive the way to the pool child."""
        header = json.loads(json.dumps(LEASE.as_header()))
        assert "args" not in header
        back = Lease.from_header(header)
        assert back is not None
        assert back == LEASE._replace(args=b"")

    @pytest.mark.parametrize("header", [{}, {"state": "abc", "run": "11", "attempt": 0}, {"exempt": True}])
    def test_a_messages_header_is_no_lease(self, header: dict[str, Any]) -> None:
        """Only the gate gives leases."""
        assert Lease.from_header(header) is None


class TestResult:
    @pytest.mark.parametrize("disposition", list(Disposition))
    def test_coalesced_means_covered_by_anothers_run(self, disposition: Disposition) -> None:
        """Joined or skipped; what made a run is its own."""
        with Celery("unit", broker="memory://", backend="cache+memory://", set_as_current=False) as app:
            result = CoalescedResult("own", app=app).described(disposition, "k", 1)
            assert result.coalesced == (disposition in ("coalesced", "skipped"))
            assert result.run_task_id == "own"

    def test_looked_up_by_id_it_knows_nothing_of_the_call(self) -> None:
        """As any `AsyncResult`."""
        with Celery("unit", broker="memory://", backend="cache+memory://", set_as_current=False) as app:
            result = CoalescedResult("own", app=app)
            assert (result.disposition, result.key, result.run_id, result.coalesced) == (None, None, None, False)
