"""Nothing lost, nothing stuck, nothing twice: in every interleaving, up to a stated bound (docs/exploration.md)."""

from __future__ import annotations

import os

import pytest

from tests.exploration.bounds import BOUNDED, DEEP
from tests.exploration.explorer import Graph, Violation, explore
from tests.exploration.harness import explored
from tests.exploration.mutations import FROM_OUTSIDE, MUTATIONS, Mutation

SETUPS = DEEP if os.environ.get("EXPLORE") == "deep" else BOUNDED


@pytest.mark.timeout(0 if SETUPS is DEEP else 600)
@pytest.mark.parametrize("name", SETUPS)
def test_guarantees_hold_in_every_interleaving(name: str) -> None:
    """Whatever comes between any two steps, and whichever of them is a process's last, the guarantees hold."""
    counts = explored(SETUPS[name])
    print(f"{name}: {counts}")
    assert counts.graph.ends


@pytest.mark.parametrize("mutation", [*MUTATIONS, *FROM_OUTSIDE], ids=lambda mutation: mutation.name)
def test_a_mistake_in_a_script_is_found(mutation: Mutation) -> None:
    """An explorer that can not fail proves nothing: every mistake is found, with the steps that show it."""
    assert mutation.changed, "the script has no such text any more"
    with pytest.raises(Violation) as raised:
        explored(mutation.setup, mutate=mutation, most=20_000)
    assert mutation.found in raised.value.what
    if raised.value.what != "nothing ends any more":
        assert raised.value.path


def _walk(steps: dict[str, str]) -> Graph:
    graph = explore(b"0", lambda state: [(other, other.encode()) for other in steps.get(state.decode(), "")])
    graph.check_drains()
    return graph


def test_interleavings_are_counted() -> None:
    """Two processes of two steps each have six interleavings, and nine states."""
    graph = explore(
        b"\0\0",
        lambda state: [
            (f"{process}", bytes(step + (place == process) for place, step in enumerate(state)))
            for process in (0, 1)
            if state[process] < 2
        ],
    )
    assert (graph.states, graph.transitions, graph.depth, graph.interleavings()) == (9, 12, 4, 6)


def test_a_circle_that_nothing_leaves_is_found() -> None:
    """From a state that only leads back to itself nothing ends any more; one that can be left is no harm."""
    assert _walk({"0": "12", "1": "0"}).interleavings() is None
    with pytest.raises(Violation, match="nothing ends any more") as raised:
        _walk({"0": "12", "1": "3", "3": "1"})
    assert raised.value.path == ["1"]
