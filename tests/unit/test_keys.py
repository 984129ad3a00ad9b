"""From a call to its key, and from a key to its names in Redis."""

from __future__ import annotations

import re
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from celery_coalesce.errors import InvalidKey
from celery_coalesce.keys import KeyTemplate, Names, Parameters, TemplateError, state_id

ANY_TEXT = st.text(st.characters(codec=None), min_size=1)


@dataclass
class Event:
    org_id: Any
    more: Any = None


def of_org(org_id: Any, kind: str = "full", *, force: bool = False) -> None:
    """Have a parameter of each usual kind."""


def key(template: str, *args: Any, run: Any = of_org, bound: bool = False, **kwargs: Any) -> str:
    """Return the key of a call."""
    return KeyTemplate(template, Parameters(run, bound)).key("tasks.org", args, kwargs)


class TestForms:
    @pytest.mark.parametrize("template", ["org:<org_id>", "org:{org_id}"])
    def test_both_forms_mean_the_same(self, template: str) -> None:
        """Angle brackets and braces."""
        assert key(template, 7) == "org:7"

    @pytest.mark.parametrize("template", ["<org_id>/{kind}", "{org_id}/<kind>"])
    def test_forms_may_be_mixed(self, template: str) -> None:
        """Several fields, of either form, with text between them."""
        assert key(template, 7, "x") == "7/x"

    def test_a_template_without_a_field_is_one_key(self) -> None:
        """Text alone is a key of its own."""
        assert key("all", 7) == "all"

    @pytest.mark.parametrize(
        ("template", "expected"),
        [("<<org>>", "<org>"), ("{{org}}", "{org}"), ("<<<org_id>>>", "<7>"), ("{{{org_id}}}", "{7}")],
    )
    def test_doubled_brackets_are_text(self, template: str, expected: str) -> None:
        """As in `str.format`."""
        assert key(template, 7) == expected

    def test_values_are_never_read_as_templates(self) -> None:
        """Brackets in a value are text."""
        assert key("org:<org_id>", "<kind>{kind}<<") == "org:<kind>{kind}<<"


class TestBinding:
    @pytest.mark.parametrize(
        ("args", "kwargs"),
        [((7, "full"), {}), ((7,), {"kind": "full"}), ((), {"kind": "full", "org_id": 7}), ((7,), {})],
    )
    def test_positional_keyword_and_default_give_one_key(self, args: Any, kwargs: Any) -> None:
        """A value counts, not how it was passed."""
        assert key("<org_id>:<kind>", *args, **kwargs) == "7:full"

    def test_a_keyword_only_parameter_is_found(self) -> None:
        """Its value and its default."""
        assert key("<force>", 7) == "False"
        assert key("<force>", 7, force=True) == "True"

    def test_the_task_itself_is_no_parameter(self) -> None:
        """`bind=True`: counting begins after `self`."""

        def bound(self: Any, org_id: int) -> None: ...

        assert key("<org_id>", 7, run=bound, bound=True) == "7"
        with pytest.raises(TemplateError, match="unknown field 'self'"):
            key("<self>", 7, run=bound, bound=True)

    def test_an_open_ended_task_takes_any_field(self) -> None:
        """`**options`: a field may name what the signature does not."""

        def open_ended(*ids: int, **options: Any) -> None: ...

        assert key("<tenant>", 1, 2, run=open_ended, tenant="t") == "t"
        with pytest.raises(InvalidKey, match="no value for 'tenant'"):
            key("<tenant>", 1, 2, run=open_ended)

    def test_what_the_call_does_not_pass_is_refused(self) -> None:
        """A missing argument has no key."""
        with pytest.raises(InvalidKey, match=r"^tasks\.org: the call has no value for 'org_id'") as raised:
            key("org:<org_id>")
        assert raised.value.task == "tasks.org"
        assert isinstance(raised.value, ValueError)

    def test_none_is_refused_with_the_remedy(self) -> None:
        """None is more often a mistake than a key."""
        with pytest.raises(InvalidKey, match=r"'org_id' of the key .* is None; pass coalesce_key=None"):
            key("org:<org_id>", None)

    @pytest.mark.parametrize(("value", "text"), [(0, "0"), (False, "False"), ("", ""), (1.5, "1.5")])
    def test_falsy_values_are_values(self, value: Any, text: str) -> None:
        """0, False and the empty string."""
        assert key("org:<org_id>", value) == f"org:{text}"


class TestDots:
    @pytest.mark.parametrize(
        "event",
        [
            Event(7),
            {"org_id": 7},
            OrderedDict(org_id=7),
        ],
    )
    def test_reach_into_attributes_and_mappings(self, event: Any) -> None:
        """One template for an object and for what a serializer made of it."""
        assert key("org:<org_id.org_id>", event) == "org:7"

    def test_reach_as_deep_as_asked(self) -> None:
        """Attribute, mapping, attribute."""
        assert key("{org_id.more.owner.org_id}", Event(1, {"owner": Event(9)})) == "9"

    def test_a_mapping_is_asked_for_its_items(self) -> None:
        """A key called like a method of dict is the key."""
        assert key("<org_id.items>", {"items": 3}) == "3"

    @pytest.mark.parametrize("event", [Event(7), {}, 7, "text", None, [1]])
    def test_what_is_not_there_is_refused(self, event: Any) -> None:
        """Whatever the value is."""
        with pytest.raises(InvalidKey, match=re.escape("no value for 'org_id.missing'")):
            key("<org_id.missing>", event)

    def test_none_at_the_end_is_refused(self) -> None:
        """With the whole path."""
        with pytest.raises(InvalidKey, match=r"'org_id\.org_id' of the key .* is None"):
            key("<org_id.org_id>", Event(None))


class TestCompiling:
    @pytest.mark.parametrize(
        ("template", "problem", "remedy"),
        [
            ("org:<org>", "unknown field 'org'", "the task's parameters are: org_id, kind, force"),
            ("org:{org.id}", "unknown field 'org'", "the task's parameters are"),
            ("org:<org_id", "stray '<'", "write '<<' for the character itself"),
            ("org:org_id>", "stray '>'", "write '>>'"),
            ("org:{", "stray '{'", "write '{{'"),
            ("}", "stray '}'", "write '}}'"),
            ("<>", "malformed field ''", "name a parameter"),
            ("{}", "malformed field ''", "name a parameter"),
            ("<0>", "malformed field '0'", "name a parameter"),
            ("<org_id!r>", "malformed field 'org_id!r'", "name a parameter"),
            ("<org_id:>4>", "malformed|stray", ""),
            ("<org_id.>", "malformed field", "name a parameter"),
            ("< org_id>", "malformed field", "name a parameter"),
            ("<org_id\n>", "malformed field", "name a parameter"),
            ("", "is empty", "leave coalesce_key out"),
        ],
    )
    def test_a_bad_template_is_refused(self, template: str, problem: str, remedy: str) -> None:
        """At once, with what is wrong and what to do."""
        with pytest.raises(TemplateError) as raised:
            KeyTemplate(template, Parameters(of_org, False))
        assert re.search(problem, raised.value.problem)
        assert remedy in raised.value.remedy

    def test_a_task_without_parameters_says_so(self) -> None:
        """None are known."""
        with pytest.raises(TemplateError, match="the task's parameters are: none"):
            KeyTemplate("<x>", Parameters(lambda: None, False))


class TestAnyText:
    @given(ANY_TEXT)
    def test_any_unicode_is_taken_as_it_is(self, text: str) -> None:
        """NUL, surrogates, emoji, braces, newlines."""
        assert key("<org_id>", text) == text

    @given(ANY_TEXT, ANY_TEXT)
    def test_state_ids_are_short_plain_names(self, scope: str, text: str) -> None:
        """Whatever scope and key are."""
        assert re.fullmatch("[a-z2-7]{26}", state_id(scope, text))

    @pytest.mark.parametrize("text", ["\0", "\ud800", "a" * 5_000_000, "{}", "\r\n", "é", "e\u0301"])
    def test_awkward_keys_have_ids_of_their_own(self, text: str) -> None:
        """No two are one; nothing is normalized."""
        others = ["", "\0\0", "\ud801", "a" * 4_999_999, "}{", "\n", "è", "é e\u0301"]
        assert state_id("s", text) not in {state_id("s", other) for other in others}

    @given(ANY_TEXT, ANY_TEXT, st.integers(min_value=0, max_value=5))
    def test_no_key_of_one_scope_is_anothers(self, scope: str, text: str, shift: int) -> None:
        """Moving the border between scope and key makes another id."""
        joined = scope + text
        border = min(shift, len(joined))
        if border != len(scope):
            assert state_id(joined[:border], joined[border:]) != state_id(scope, text)

    def test_ids_are_the_same_for_ever(self) -> None:
        """They are stored: a change of this test is a change of the format."""
        assert state_id("tasks.process", "org:7") == "ezbwxmvghc3lg6hjdehlt4rbjq"


class TestNames:
    def test_all_names_share_one_hash_tag(self) -> None:
        """The first braces of a name, which decide on its slot in a Cluster."""
        names = Names("pre:", "ns")
        state = state_id("s", "{other}")
        every = [
            *names.record(state), names.held("w@h/1/a{b}"), names.meta, names.timers, names.presence,
            names.drains, names.seen,
        ]  # fmt: skip
        assert {re.search(r"\{(.*?)\}", name).group(1) for name in every} == {"ns"}  # type: ignore[union-attr]
        assert all(name.startswith("pre:{ns}:") for name in every)
        assert len(set(every)) == len(every) - 2  # a record's four names include two of the namespace

    def test_a_record_has_a_name_of_its_own(self) -> None:
        """By its state id."""
        record, waiting, meta, timers, kept, *_ = Names("", "coalesce").record("abc")
        assert kept == "{coalesce}:kept:abc"
        assert (record, waiting) == ("{coalesce}:rec:abc", "{coalesce}:wait:abc")
        assert (meta, timers) == ("{coalesce}:meta", "{coalesce}:timers")
