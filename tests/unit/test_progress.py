"""The arithmetic of steps: weighted, the active one half."""

from __future__ import annotations

import pytest

from celery_coalesce.errors import UnknownStep
from celery_coalesce.progress import Progress

STEPS = {"build": 30.0, "test": 20.0, "deploy": 50.0}


@pytest.mark.parametrize(("step", "progress"), [("build", 15.0), ("test", 40.0), ("deploy", 75.0)])
def test_active_step_counts_half_and_those_before_it_whole(step: str, progress: float) -> None:
    """Whatever steps were named before."""
    assert Progress.at("task", STEPS, step).progress == progress


def test_steps_before_and_after_are_named_in_their_order() -> None:
    """Of the declaration."""
    first, second = Progress.at("task", STEPS, "build"), Progress.at("task", STEPS, "test")
    assert (first.done, first.left) == ((), ("test", "deploy"))
    assert (second.done, second.left) == (("build",), ("deploy",))


@pytest.mark.parametrize(
    ("steps", "progress"),
    [({"a": 1.0, "b": 1.0}, [25.0, 75.0]), ({"a": 1.0, "b": 2.0}, [16.67, 66.67]), ({"only": 0.5}, [50.0])],
)
def test_weights_need_not_add_up_to_a_hundred(steps: dict[str, float], progress: list[float]) -> None:
    """They are shares of their sum."""
    assert [Progress.at("task", steps, step).progress for step in steps] == progress


def test_progress_grows_with_every_step_and_ends_at_a_hundred() -> None:
    """And no step is there yet."""
    told = [Progress.at("task", STEPS, step).progress for step in STEPS]
    complete = Progress.complete(STEPS)
    assert 0 < told[0] < told[1] < told[2] < complete.progress == 100.0
    assert (complete.step, complete.done, complete.left) == (None, tuple(STEPS), ())


def test_plain_values_are_those_of_json() -> None:
    """A result backend and an event carry them."""
    assert Progress.at("task", STEPS, "test").as_dict() == {
        "step": "test",
        "progress": 40.0,
        "done": ["build"],
        "left": ["deploy"],
    }


@pytest.mark.parametrize("steps", [STEPS, {}])
def test_unknown_step_is_refused_with_the_known_ones(steps: dict[str, float]) -> None:
    """The error says what, and what there is."""
    with pytest.raises(UnknownStep, match="'biuld'") as caught:
        Progress.at("task", steps, "biuld")
    assert (caught.value.task, caught.value.step, caught.value.known) == ("task", "biuld", list(steps))
