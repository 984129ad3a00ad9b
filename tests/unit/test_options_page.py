"""The page of the options: every option is on it, and its table says of every pair what a declaration does."""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest

from celery_coalesce.contradictions import CONTRADICTIONS, NEEDS
from celery_coalesce.errors import OptionError
from celery_coalesce.options import OPTIONS, PER_CALL, Constraint
from celery_coalesce.policy import Policy
from tests.support.process import ROOT

PAGE = (ROOT / "docs" / "options.md").read_text("utf-8")


def body(org_id: int) -> None:
    """Have a parameter."""


def named(org_id: int) -> str:
    """Return a constant."""
    return "name"


#: What the table compares, by the words that stand for it there: an option, and a value that is not its default.
FEATURES: dict[str, dict[str, Any]] = {
    "coalesce=skip": {"coalesce": "skip"},
    "coalesce=serialize": {"coalesce": "serialize"},
    "coalesce=replace": {"coalesce": "replace"},
    "coalesce_key": {"coalesce_key": "<org_id>"},
    "coalesce_scope": {"coalesce_scope": "shared"},
    "coalesce_max_queued": {"coalesce_max_queued": 2},
    "coalesce_overflow=reject": {"coalesce_overflow": "reject"},
    "coalesce_args": {"coalesce_args": "first"},
    "coalesce_limit": {"coalesce_limit": 2},
    "coalesce_delay": {"coalesce_delay": 1},
    "coalesce_max_delay": {"coalesce_max_delay": 9, "coalesce_delay": 1},
    "coalesce_cooldown": {"coalesce_cooldown": 1},
    "coalesce_constraints": {"coalesce_constraints": [Constraint("name")]},
    "coalesce_once": {"coalesce_once": True},
    "coalesce_should_run": {"coalesce_should_run": named},
    "coalesce_on_error=stop": {"coalesce_on_error": "stop"},
    "coalesce_on_retry=release": {"coalesce_on_retry": "release"},
    "coalesce_on_retry=merge": {"coalesce_on_retry": "merge"},
    "coalesce_grace": {"coalesce_grace": 5, "coalesce": "replace"},
    "coalesce_labels": {"coalesce_labels": {"org": "<org_id>"}},
    "coalesce_steps": {"coalesce_steps": {"one": 1}},
    "coalesce_setup": {"coalesce_setup": dict},
}


def together(one: str, other: str) -> bool | None:
    """Tell whether a task may declare both; ``None`` if they are two values of one option."""
    first, second = FEATURES[one], FEATURES[other]
    if any(first[option] != second[option] for option in first.keys() & second.keys()):
        return None
    try:
        Policy.declare("task", body, False, {**first, **second})
    except OptionError:
        return False
    return True


def table() -> str:
    """Return the table as it has to stand on the page."""
    shown = {True: "", False: "no", None: "-"}
    numbers = list(range(1, len(FEATURES) + 1))
    lines = ["| | | " + " | ".join(map(str, numbers)) + " |", "|---" * (len(FEATURES) + 2) + "|"]
    for number, one in zip(numbers, FEATURES, strict=True):
        cells = ["-" if one == other else shown[together(one, other)] for other in FEATURES]
        lines.append(f"| {number} | `{one}` | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def test_every_option_is_on_the_page() -> None:
    """With its default."""
    reference = PAGE.partition("## Which go together")[0].splitlines()
    cells = [[cell.strip() for cell in row.split("|")] for row in reference if row.startswith("| `coalesce")]
    rows = {cell[1]: cell[2] for cell in cells}
    assert {f"`{option}`" for option in OPTIONS} <= rows.keys()
    for option, default in OPTIONS.items():
        if default:
            assert rows[f"`{option}`"] == (f'`"{default}"`' if isinstance(default, str) else f"`{default}`")


def test_what_a_call_may_override_is_on_the_page() -> None:
    """All of it, and nothing else."""
    paragraph = next(each for each in PAGE.split("\n\n") if each.startswith("**Per call**"))
    assert set(re.findall(r"`(coalesce\w*)`", paragraph)) == PER_CALL


def test_the_table_of_pairs_is_what_declarations_do() -> None:
    """Each pair was declared to find out."""
    assert table() in PAGE, f"docs/options.md should have:\n{table()}"


def test_every_refusal_is_explained_on_the_page() -> None:
    """In the words of its error."""
    for pair in (*CONTRADICTIONS, *NEEDS):
        line = f"| `{pair.one}` | `{pair.other}` | {pair.reason}; {pair.remedy} |"
        assert line in PAGE, f"docs/options.md should have:\n{line}"


@pytest.mark.parametrize("pair", CONTRADICTIONS, ids=lambda pair: f"{pair.one} and {pair.other}")
def test_a_contradiction_is_refused_with_its_reason(pair: Any) -> None:
    """Whichever else would be wrong, and with the offending value."""
    options = {**FEATURES[pair.other], **FEATURES[pair.one]}
    with pytest.raises(OptionError) as refused:
        Policy.declare("task", body, False, options)
    assert (refused.value.problem, refused.value.remedy) == (pair.reason, pair.remedy)


@pytest.mark.parametrize(
    "pair",
    [pair for pair in CONTRADICTIONS if pair.one.partition("=")[0] in PER_CALL],
    ids=lambda pair: f"{pair.one} and {pair.other}",
)
def test_one_call_may_not_contradict_its_task(pair: Any) -> None:
    """What a call asks for itself is never left aside in silence."""
    policy = Policy.declare("task", body, False, FEATURES[pair.other])
    with pytest.raises(OptionError) as refused:
        policy.override(FEATURES[pair.one])
    assert refused.value.option in FEATURES[pair.one]


@pytest.mark.parametrize("mode", ["skip", "serialize"])
def test_a_calls_own_mode_leaves_aside_what_it_has_no_use_for(mode: str) -> None:
    """A debounced, merging task may be called once with another mode."""
    policy = Policy.declare("task", body, False, {"coalesce_delay": 1, "coalesce_max_queued": 3})
    assert policy.override({"coalesce": mode}).mode == mode


@pytest.mark.parametrize("pair", NEEDS, ids=lambda pair: pair.one)
def test_what_has_no_meaning_alone_is_refused_alone(pair: Any) -> None:
    """Together it is fine."""
    alone = {pair.one: FEATURES[pair.one][pair.one]}
    with pytest.raises(OptionError, match="has no meaning without"):
        Policy.declare("task", body, False, alone)
    Policy.declare("task", body, False, FEATURES[pair.one])


def test_nothing_is_refused_that_is_not_in_the_list() -> None:
    """The table has no "no" without a reason."""
    listed = {frozenset((pair.one, pair.other)) for pair in CONTRADICTIONS}
    refused = {frozenset(pair) for pair in itertools.combinations(FEATURES, 2) if together(*pair) is False}
    implied = {frozenset(pair) for pair in refused if {"coalesce_max_delay", "coalesce_grace"} & set(pair)}
    assert refused - implied == listed - implied
