"""docs/guarantees.md names tests and commands that are there."""

from __future__ import annotations

import importlib.util
import re

import pytest

from tests.support.process import ROOT

PAGE = (ROOT / "docs" / "guarantees.md").read_text("utf-8")
README = (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\b(tests/[\w/]+(?:\.py)?)", PAGE))))
def test_what_it_names_is_there(name: str) -> None:
    """A guarantee that points at no test promises nothing."""
    assert (ROOT / name).exists()


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m ([\w.]+)", PAGE))))
def test_its_commands_are_there(module: str) -> None:
    """They can be run."""
    assert importlib.util.find_spec(module) is not None


def test_it_has_every_guarantee_and_the_readme_points_to_it() -> None:
    """Nine, in both."""
    for number in range(1, 10):
        assert f"| **G{number}**" in PAGE
        assert f"| **G{number}**" in README
    assert "docs/guarantees.md" in README
