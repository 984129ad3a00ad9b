"""The protocol as a specification in Promela (protocol.pml), and what the model checker says of it."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from celery_coalesce.store.scripts import SCRIPTS
from tests.support.process import require

MODEL = Path(__file__).with_name("protocol.pml")

#: What is checked: the assertions and that nobody waits for ever; or a property in the model, by its name.
SAFETY, COVERS, DRAINED = "safety", "covers", "drained"

#: Two producers of one call each, and any one fault; and a third call, which joins a pending run, without faults.
FAULTY, MERGING = ("CALLS=2", "FAULTS=1"), ("CALLS=3", "FAULTS=0")


def _verified(directory: Path, what: str, *defined: str) -> tuple[int, int]:
    """Return how many errors the model has, and in how many states."""
    spin, gcc = require("spin"), require("gcc")
    flags = [f"-D{name}" for name in defined]
    how = ["-DSAFETY", "-DNOCLAIM"] if what == SAFETY else []
    search = [] if what == SAFETY else ["-a", "-N", what]
    for command in (
        [spin, *flags, "-a", str(MODEL)],
        [gcc, "-w", "-O1", "-DCOLLAPSE", *how, "-o", "pan", "pan.c"],
    ):
        subprocess.run(command, cwd=directory, check=True, capture_output=True, text=True, timeout=120)
    told = subprocess.run(
        ["./pan", "-m1000000", *search], cwd=directory, check=False, capture_output=True, text=True, timeout=280
    ).stdout
    errors, states = re.search(r"errors: (\d+)", told), re.search(r"(\d+) states, stored", told)
    assert errors, told
    assert states, told
    assert "max search depth too small" not in told
    return int(errors[1]), int(states[1])


@pytest.mark.timeout(300)
@pytest.mark.parametrize("acks", ["EARLY", "LATE"])
@pytest.mark.parametrize(("what", "bound"), [(SAFETY, FAULTY), (SAFETY, MERGING), (COVERS, FAULTY), (DRAINED, FAULTY)])
def test_the_protocol_is_right(tmp_path: Path, what: str, bound: tuple[str, ...], acks: str) -> None:
    """Whatever fails, wherever: no two runs, no lost trigger, one drain; and everything comes to its end."""
    errors, states = _verified(tmp_path, what, *bound, acks)
    print(f"{what} {' '.join(bound)} {acks}: {states:,} states")
    assert errors == 0
    assert states > 10_000


@pytest.mark.timeout(300)
@pytest.mark.parametrize(
    ("mistake", "what", "bound"),
    [
        ("NO_TOKEN", SAFETY, FAULTY),
        ("MERGE_INTO_RUNNING", SAFETY, MERGING),
        ("RUN_TWICE", SAFETY, FAULTY),
        ("DRAIN_TWICE", SAFETY, FAULTY),
        ("LOSE_LIVING", SAFETY, FAULTY),
        ("NO_TIMER", COVERS, FAULTY),
        ("FORGET_PENDING", DRAINED, MERGING),
    ],
)
def test_a_mistake_in_the_protocol_is_found(tmp_path: Path, mistake: str, what: str, bound: tuple[str, ...]) -> None:
    """A property that no mistake could break would say nothing: with each mistake one fails."""
    errors, _ = _verified(tmp_path, what, *bound, mistake)
    assert errors > 0


def test_every_transition_is_in_the_protocol_or_said_to_be_left_out() -> None:
    """The model's transitions have the scripts' names; whatever script is not modelled is named as such."""
    text = MODEL.read_text("utf-8")
    transitions = text[text.index("-- transitions") : text.index("-- everything else")]
    helpers = {"dispatched_now", "granted"}
    modelled = set(re.findall(r"^inline (\w+)\(", transitions, re.MULTILINE)) - helpers
    [left_out] = re.findall(r"Left out.*?:\n \*((?: +\w+)+)\n", text, re.DOTALL)
    assert modelled | set(left_out.split()) == set(SCRIPTS)
    assert not modelled & set(left_out.split())
