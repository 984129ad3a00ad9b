"""The transitions' headers, their declarations, and the page that describes them: one truth, three places."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path

import pytest

from celery_coalesce.keys import Names
from celery_coalesce.store.scripts import PASSING, SCRIPTS, script
from tests.support.process import ROOT

LUA = Path(str(resources.files("celery_coalesce.store").joinpath("lua")))
FILES = sorted(LUA.glob("*.lua"))
LIBRARY = sorted((LUA / "lib").glob("*.lua"))
DESIGN = (ROOT / "docs" / "design.md").read_text("utf-8")

#: An argument of the blob kind, in the order in which `ARGV[2]` and on are named.
LINES = ("KEYS", "ARGV", "Returns", "Transition", "Order")


def header(path: Path) -> dict[str, str]:
    """Return the lines of a script's header by their first word; "" is the purpose."""
    found = {"": ""}
    name = ""
    for line in path.read_text("utf-8").splitlines():
        if not line.startswith("-- ") and line != "--":
            break
        text = line[2:].strip()
        first, colon, rest = text.partition(": ")
        if colon and first in LINES and not line.startswith("--  "):
            name = first
            found[name] = rest
        else:
            found[name] = f"{found[name]} {text}".strip()
    return found


def test_every_script_is_declared_and_every_declaration_has_a_script() -> None:
    """Neither side knows one that the other does not."""
    assert {path.stem for path in FILES} == set(SCRIPTS)


def test_every_library_file_is_included() -> None:
    """Nothing lies about unused."""
    included = set()
    for path in (*FILES, *LIBRARY):
        included |= set(re.findall(r"^ *--# include (\w+)$", path.read_text("utf-8"), re.MULTILINE))
    assert included == {path.stem for path in LIBRARY}


def test_what_writes_nothing_need_not_outlive_a_failover() -> None:
    """And of what writes, nothing is waited for but what the state is made of."""
    reading = {path.stem for path in FILES if header(path)["Order"].startswith("nothing is written")}
    assert reading | {"check", "bury", "hand"} == PASSING


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
class TestEachScript:
    def test_its_header_has_every_line(self, path: Path) -> None:
        """Purpose, keys, arguments, returns, transition, and why the writes stand in their order."""
        lines = header(path)
        assert set(lines) == {"", *LINES}
        assert all(lines.values())
        assert lines[""].endswith(".")

    def test_its_keys_are_those_declared(self, path: Path) -> None:
        """In the order of KEYS."""
        assert tuple(re.split(r",\s*", header(path)["KEYS"])) == SCRIPTS[path.stem]

    def test_it_uses_no_key_beyond_them(self, path: Path) -> None:
        """And each of its own by number."""
        text = script(path.stem).text
        numbers = {int(number) for number in re.findall(r"KEYS\[(\d+)\]", text)}
        assert numbers <= set(range(1, len(SCRIPTS[path.stem]) + 1))

    def test_its_arguments_are_those_of_its_header(self, path: Path) -> None:
        """What it reads of `asked` is named there."""
        own = path.read_text("utf-8")
        names = set(re.findall(r"\basked\.(\w+)", own))
        declared = set(re.findall(r"\w+", header(path)["ARGV"]))
        if "(as for trigger" not in header(path)["ARGV"]:
            assert names <= declared, names - declared

    def test_every_word_that_it_answers_is_in_its_header(self, path: Path) -> None:
        """A reply begins with a word."""
        returns = header(path)["Returns"]
        for word in re.findall(r"return \{'(\w+)'", path.read_text("utf-8")):
            assert re.search(rf"\b{word}\b", returns), f"{word!r} is not in: {returns}"

    def test_it_is_read_with_its_includes_and_without_comments(self, path: Path) -> None:
        """What is sent is code alone."""
        text = script(path.stem).text
        assert "#include" not in text
        assert not re.search(r"^\s*--", text, re.MULTILINE)
        assert re.fullmatch("[0-9a-f]{40}", script(path.stem).sha)
        assert script(path.stem) is script(path.stem)

    def test_it_keeps_the_rules(self, path: Path) -> None:
        """No keys but through KEYS, no scans of the keyspace, no other clock."""
        text = script(path.stem).text
        assert not re.search(r"call\('(KEYS|SCAN|RANDOMKEY|FLUSH\w*|DBSIZE)'", text)
        assert "os.time" not in text
        assert "os.clock" not in text
        assert "math.random" not in text

    def test_the_design_page_has_it(self, path: Path) -> None:
        """With its transition, in the table of transitions."""
        rows = [line for line in DESIGN.splitlines() if line.startswith("|") and f"`{path.stem}`" in line]
        assert rows, f"docs/design.md does not mention {path.stem}"


def test_the_design_page_mentions_no_script_that_is_not_there() -> None:
    """The first column of the table of transitions."""
    table = DESIGN.partition("| script | from -> to |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", "\n".join(row.split("|")[1] for row in table.splitlines() if row.count("|") > 2))
    assert set(named) == set(SCRIPTS)


def test_the_design_page_has_every_key() -> None:
    """The table of what is stored."""
    names = Names("", "ns")
    every = [*names.record("<state>"), names.presence, names.held("<process>"), names.drains, names.seen, names.history]
    for name in every:
        assert f"`{name}`" in DESIGN, name
