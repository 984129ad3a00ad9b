"""Rows of figures, as a table and as JSON."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from benchmarks.speed.rounds import Spread, ratios

PACKAGES = (
    "celery-coalesce",
    "celery",
    "kombu",
    "redis",
    "hiredis",
    "celery-once",
    "celery-singleton",
    "celery-heimdall",
)


@dataclass(frozen=True)
class Target:
    """A bound that a row should keep."""

    text: str
    met: bool


@dataclass(frozen=True)
class Row:
    """One line: a figure, beside another of the same rounds if there is one."""

    what: str
    value: Spread
    unit: str
    ratio: Spread | None = None
    beside: str = ""
    targets: tuple[Target, ...] = ()


def row(
    what: str,
    values: Sequence[float],
    unit: str,
    *,
    beside: tuple[str, Sequence[float]] | None = None,
    most: Sequence[float] = (),
    least: Sequence[float] = (),
) -> Row:
    """Make a row.

    Args:
        what: What was measured.
        values: The figures, one for each round.
        unit: Their unit.
        beside: What they are set beside, and its figures in the same rounds.
        most: Upper bounds: of the ratio, or of the value where nothing is beside it.
        least: Lower bounds, likewise.
    """
    value = Spread.of(values)
    ratio = Spread.of(ratios(values, beside[1])) if beside else None
    judged = (ratio or value).median
    targets = [Target(f"<= {bound:g}", judged <= bound) for bound in most]
    targets += [Target(f">= {bound:g}", judged >= bound) for bound in least]
    return Row(what, value, unit, ratio, beside[0] if beside else "", tuple(targets))


def growth_rows(figures: Mapping[str, Any]) -> list[Row]:
    """Make a row of each cost at the largest size, beside the one at the least."""
    rows = []
    for figure in figures.values():
        for what, costs in figure.get("series", {}).items():
            size = f"{figure['x'][-1]:,} {figure['xlabel']}"
            beside = ("the cost of one" if figure["x"][0] == 1 else f"that of {figure['x'][0]}", costs[:1])
            rows.append(row(f"{what}, {size}", costs[-1:], "us", beside=beside))
    return rows


def table(section: str, rows: Sequence[Row], seconds: float) -> str:
    """Return a section as text."""
    if not rows:
        return f"\n{section}: nothing measured"
    cells = [(each.what, _value(each), _ratio(each), _targets(each)) for each in rows]
    widths = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = [
        f"{what:{widths[0]}}  {value:>{widths[1]}}  {ratio:{widths[2]}}  {targets}".rstrip()
        for what, value, ratio, targets in cells
    ]
    return "\n".join(["", f"{section}  ({seconds:.0f} s)", "-" * max(map(len, lines)), *lines])


def as_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return rows as what JSON can hold."""
    return [asdict(each) for each in rows]


def surroundings(server: str) -> dict[str, Any]:
    """Return what the figures were measured with."""
    found = {"python": platform.python_version(), "cpus": os.cpu_count(), "state server": server}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _value(each: Row) -> str:
    return f"{_number(each.value.median)} {each.unit}{_quartiles(each.value, _number)}"


def _ratio(each: Row) -> str:
    ratio = each.ratio
    return f"{ratio.median:.2f} x {each.beside}{_quartiles(ratio, '{:.2f}'.format)}" if ratio else ""


def _quartiles(spread: Spread, written: Callable[[float], str]) -> str:
    return "" if spread.low == spread.high else f" [{written(spread.low)}..{written(spread.high)}]"


def _targets(each: Row) -> str:
    return ", ".join(f"{target.text} {'met' if target.met else 'missed'}" for target in each.targets)


def _number(value: float) -> str:
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
