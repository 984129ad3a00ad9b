"""Keys and arguments of any kind, against a real server: each is itself, harms no other, and leaves nothing behind."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from celery_coalesce import InvalidKey, OptionError
from celery_coalesce.policy import Policy
from tests.integration.conftest import make_driver  # noqa: F401 - a fixture
from tests.integration.driver import Driver

#: Text that means something somewhere on the way: to templates, to Redis' names, patterns and hash tags, to Lua, JSON.
MEANINGFUL = [
    *"{}<>[]*?:/\\%\0\r\n\x1f\x7f\ufeff\u202e\ud800\U0001f600'\"",
    "{coalesce}",
    "{{coalesce}}:meta",
    "{coalesce}:rec:",
    "<key>",
    "{key}",
    "{0}",
    "%s",
    "KEYS[1]",
    "]]..error()..[[",
    "\r\nFLUSHALL\r\n",
    "../../meta",
]
TEXT = st.lists(st.sampled_from(MEANINGFUL) | st.text(max_size=5), min_size=1, max_size=6).map("".join)


@pytest.fixture
def drive(make_driver: Any) -> Driver:  # noqa: F811
    return make_driver()  # type: ignore[no-any-return]


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(one=TEXT, other=TEXT, value=st.text(max_size=20))
def test_keys_of_any_text_are_themselves_and_no_other(drive: Driver, one: str, other: str, value: str) -> None:
    """A run of one neither meets nor ends a run of another, whatever the two look like."""
    mine = drive.run(drive.trigger(value, key=one), one)
    assert mine.key == one
    if other != one:
        theirs = drive.run(drive.trigger(value, key=other), other)
        assert theirs.key == other
        drive.finish(theirs)
    assert drive.check_lease(mine)
    assert drive.shown(one)["head"]
    drive.finish(mine)
    assert drive.left() in ([], ["presence"])


@pytest.mark.parametrize("text", ["k" * 5_000_000, "\0" * 1_000_000, "{" * 1_000_000], ids=["k", "NUL", "brace"])
def test_keys_of_megabytes_have_short_names(drive: Driver, text: str) -> None:
    """The text is kept once, in its record."""
    lease = drive.run(drive.trigger(1, key=text), text)
    assert lease.key == text
    assert max(map(len, drive.keys())) < 100
    drive.finish(lease)
    assert drive.left() in ([], ["presence"])


@settings(max_examples=300, deadline=None, derandomize=True, database=None)
@given(value=TEXT)
def test_a_value_is_never_read_as_a_template(value: str) -> None:
    """What looks like a field in an argument is that argument's text."""
    policy = Policy.declare("task", lambda org: None, False, {"coalesce_key": "org:<org>"})
    assert policy.key((value,), {}) == f"org:{value}"


@pytest.mark.parametrize("template", ["{org!r}", "{org:>9}", "{org:{org}}", "<org!r:{width}>", "{0}", "{}"])
def test_a_template_is_no_format_string(template: str) -> None:
    """It names parameters, and what is in them; conversions, formats and positions are refused."""
    with pytest.raises(OptionError):
        Policy.declare("task", lambda org, width=1: None, False, {"coalesce_key": template})


@pytest.mark.parametrize("key", [None, 7, b"bytes", "", ["k"], {"k": 1}, float("nan")], ids=repr)
def test_a_callable_can_not_smuggle_in_what_is_no_text(key: Any) -> None:
    """``None`` is an exempt call; anything else that is not a string with something in it is refused."""
    policy = Policy.declare("task", lambda org: None, False, {"coalesce_key": lambda org: key})
    if key is None:
        assert policy.key((1,), {}) is None
    else:
        with pytest.raises(InvalidKey):
            policy.key((1,), {})
