"""A task's options: those that make sense, and what is said of those that do not."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from celery.exceptions import ImproperlyConfigured

from celery_coalesce.errors import InvalidKey, OptionError
from celery_coalesce.policy import OPTIONS, PER_CALL, Policy
from celery_coalesce.states import Mode, Overflow, Rule


def run(org_id: Any, kind: str = "full") -> None:
    """Have two parameters."""


def declare(**options: Any) -> Policy:
    """Validate options of a task with the parameters `org_id, kind="full"`."""
    return Policy.declare("tasks.org", run, False, options)


def fields(policy: Policy) -> dict[str, Any]:
    """Return what a policy says."""
    return {**vars(policy), "parameters": str(policy.parameters.signature)}


def refused(call: Any, **options: Any) -> OptionError:
    """Return the error that options are refused with."""
    with pytest.raises(OptionError) as raised:
        call(options) if call is not declare else declare(**options)
    error = raised.value
    assert isinstance(error, ImproperlyConfigured)
    assert error.task == "tasks.org"
    assert str(error).startswith(f"tasks.org: {error.option}=")
    assert repr(error.value) in str(error)
    assert str(error).partition("; ")[2], "no remedy"
    return error


def one_argument(earlier: Any) -> Any:
    """Merge nothing."""


def own_signature(org_id: Any, kind: str = "full") -> str:
    """Have the task's own parameters."""
    return f"{org_id}/{kind}"


class TestDefaults:
    def test_a_task_without_options_is_one_queued_key(self) -> None:
        """One run, one follow-up, the latest arguments, in a scope of its own."""
        policy = declare()
        assert policy.mode is Mode.QUEUE
        assert policy.overflow is Overflow.MERGE
        assert (policy.rule, policy.merge) == (Rule.LATEST, None)
        assert (policy.max_queued, policy.limit) == (1, 1)
        assert policy.scope == "tasks.org"
        assert policy.whole_task
        assert policy.key((1,), {}) == policy.key((2,), {}) == "tasks.org"

    def test_every_option_may_be_given_as_its_default(self) -> None:
        """Spelling out the defaults changes nothing."""
        assert fields(declare(**OPTIONS)) == fields(declare())

    def test_what_may_be_given_per_call_is_an_option(self) -> None:
        """No call knows a word that a task does not."""
        assert set(OPTIONS) >= PER_CALL


class TestBadOptions:
    @pytest.mark.parametrize(
        ("option", "value", "remedy"),
        [
            ("coalesce", "queued", "use one of 'queue', 'skip', 'serialize'"),
            ("coalesce", None, "use one of"),
            ("coalesce", True, "use one of"),
            ("coalesce", ["queue"], "use one of"),
            ("coalesce_max_queued", 0, "give such a number"),
            ("coalesce_max_queued", -1, "give such a number"),
            ("coalesce_max_queued", 1.0, "give such a number"),
            ("coalesce_max_queued", True, "give such a number"),
            ("coalesce_max_queued", "3", "give such a number"),
            ("coalesce_max_queued", None, "give such a number"),
            ("coalesce_max_queued", 10**9, "give such a number"),
            ("coalesce_overflow", "drop", "use one of 'merge', 'reject'"),
            ("coalesce_overflow", False, "use one of"),
            ("coalesce_args", "newest", "use 'latest', 'first' or a function"),
            ("coalesce_args", "merge", "use 'latest', 'first' or a function"),
            ("coalesce_args", 1, "use 'latest', 'first' or a function"),
            ("coalesce_args", {}, "use 'latest', 'first' or a function"),
            ("coalesce_args", one_argument, "write merge(earlier, later)"),
            ("coalesce_limit", 0, "give such a number"),
            ("coalesce_limit", 2.5, "give such a number"),
            ("coalesce_limit", float("inf"), "give such a number"),
            ("coalesce_scope", "", "leave it out to use the task's name"),
            ("coalesce_scope", 7, "leave it out to use the task's name"),
            ("coalesce_scope", b"scope", "leave it out to use the task's name"),
            ("coalesce_key", "org:<org>", "the task's parameters are: org_id, kind"),
            ("coalesce_key", "org:<org_id", "write '<<' for the character itself"),
            ("coalesce_key", "", "leave coalesce_key out"),
            ("coalesce_key", 7, 'write "org:<org_id>", or a function'),
            ("coalesce_key", ["org_id"], 'write "org:<org_id>", or a function'),
            ("coalesce_key", b"org", 'write "org:<org_id>", or a function'),
            ("coalesce_key", one_argument, "give it the task's own parameters, (org_id"),
        ],
    )
    def test_is_refused_by_name_with_its_value_and_a_remedy(self, option: str, value: Any, remedy: str) -> None:
        """Each bad value of each option."""
        error = refused(declare, **{option: value})
        assert error.option == option
        assert error.value is value
        assert remedy in str(error)

    @pytest.mark.parametrize(
        ("option", "remedy"),
        [
            ("coalesce_kye", "did you mean 'coalesce_key'?"),
            ("coalesce_max_queue", "did you mean 'coalesce_max_queued'?"),
            ("coalesce_", "did you mean"),
            ("coalesce_$$$$$$$$$$$$$$", "known are: coalesce, coalesce_args"),
        ],
    )
    def test_an_unknown_option_is_refused_with_a_hint(self, option: str, remedy: str) -> None:
        """A misspelt option is never ignored."""
        error = refused(declare, **{option: 1})
        assert "is no option" in str(error)
        assert remedy in str(error)

    def test_a_value_equal_to_a_word_in_disguise_is_the_word(self) -> None:
        """The enums are strings."""
        assert declare(coalesce=Mode.SKIP).mode is Mode.SKIP


class TestContradictions:
    def test_skip_answers_with_one_run(self) -> None:
        """Single flight and several runs at once."""
        error = refused(declare, coalesce="skip", coalesce_limit=2)
        assert error.option == "coalesce_limit"
        assert "which answers a call with the one run there is" in str(error)

    @pytest.mark.parametrize("mode", ["skip", "serialize"])
    @pytest.mark.parametrize(
        ("option", "value"),
        [
            ("coalesce_max_queued", 2),
            ("coalesce_overflow", "reject"),
            ("coalesce_args", "first"),
            ("coalesce_args", lambda earlier, later: later),
        ],
    )
    def test_what_only_merging_knows_is_refused_without_it(self, mode: str, option: str, value: Any) -> None:
        """With the value that was given, and the reason."""
        error = refused(declare, coalesce=mode, **{option: value})
        assert (error.option, error.value) == (option, value)
        assert "which merges nothing" in str(error)

    @pytest.mark.parametrize("mode", ["skip", "serialize"])
    def test_the_defaults_contradict_nothing(self, mode: str) -> None:
        """A mode alone is always fine."""
        assert declare(coalesce=mode).mode == mode

    def test_serialize_may_have_slots(self) -> None:
        """A semaphore."""
        assert declare(coalesce="serialize", coalesce_limit=3).limit == 3


class TestPerCall:
    def test_nothing_changes_nothing(self) -> None:
        """The very same policy."""
        policy = declare()
        assert policy.override({}) is policy

    @pytest.mark.parametrize(
        ("option", "value", "field", "expected"),
        [
            ("coalesce", "serialize", "mode", Mode.SERIALIZE),
            ("coalesce_max_queued", 5, "max_queued", 5),
            ("coalesce_overflow", "reject", "overflow", Overflow.REJECT),
            ("coalesce_args", "first", "rule", Rule.FIRST),
        ],
    )
    def test_one_call_may_differ(self, option: str, value: Any, field: str, expected: Any) -> None:
        """And the task's own options stay."""
        policy = declare()
        assert getattr(policy.override({option: value}), field) == expected
        assert fields(policy) == fields(declare())

    def test_a_merge_function_takes_the_rules_place_and_gives_it_back(self) -> None:
        """Rule and function never disagree."""

        def newest(earlier: Any, later: Any) -> Any:
            return later

        policy = declare(coalesce_args=newest)
        assert (policy.rule, policy.merge) == (Rule.MERGE, newest)
        one = policy.override({"coalesce_args": "latest"})
        assert (one.rule, one.merge) == (Rule.LATEST, None)

    @pytest.mark.parametrize("option", sorted(set(OPTIONS) - PER_CALL))
    def test_what_all_runs_of_a_key_must_agree_on_can_not_differ(self, option: str) -> None:
        """Scope and limit are the task's alone."""
        error = refused(declare().override, **{option: 2})
        assert "can not differ from call to call" in str(error)
        assert "declare it on the task" in str(error)

    def test_an_unknown_option_is_refused_with_a_hint(self) -> None:
        """As at the declaration."""
        assert "did you mean 'coalesce_args'?" in str(refused(declare().override, coalesce_arg="first"))

    @pytest.mark.parametrize(
        ("option", "value"),
        [("coalesce", "x"), ("coalesce_max_queued", 0), ("coalesce_overflow", 1), ("coalesce_args", 0)],
    )
    def test_a_bad_value_is_refused(self, option: str, value: Any) -> None:
        """As at the declaration."""
        assert refused(declare().override, **{option: value}).option == option

    def test_a_contradiction_is_refused(self) -> None:
        """Of the call with itself, and of the call with its task."""
        refused(declare().override, coalesce="serialize", coalesce_max_queued=2)
        refused(declare(coalesce_limit=2).override, coalesce="skip")

    @pytest.mark.parametrize("mode", ["skip", "serialize"])
    def test_a_call_may_leave_merging_aside(self, mode: str) -> None:
        """What the task declared for merging means nothing for that call, and is no contradiction."""
        policy = declare(coalesce_max_queued=3, coalesce_args="first")
        assert policy.override({"coalesce": mode}).mode == mode


class TestKeys:
    def test_a_template_is_bound_as_python_binds(self) -> None:
        """Defaults included."""
        policy = declare(coalesce_key="org:<org_id>/<kind>")
        assert policy.key((7,), {}) == policy.key((), {"org_id": 7, "kind": "full"}) == "org:7/full"
        assert not policy.whole_task

    def test_a_callable_gets_the_calls_arguments_with_the_tasks_defaults(self) -> None:
        """However they were passed."""
        policy = declare(coalesce_key=own_signature)
        assert policy.key((), {"org_id": 7}) == "7/full"
        assert policy.key((7, "x"), {}) == "7/x"

    def test_a_callable_may_exempt_a_call(self) -> None:
        """None: a plain Celery call."""
        policy = declare(coalesce_key=lambda org_id, kind="full": None if org_id is None else f"{org_id}")
        assert policy.key((None,), {}) is None
        assert policy.key((1,), {}) == "1"

    def test_a_callable_may_take_anything(self) -> None:
        """`*args, **kwargs` fits every task."""
        policy = declare(coalesce_key=lambda *args, **kwargs: f"{args}{kwargs}")
        assert policy.key((7,), {}) == "(7, 'full'){}"

    @pytest.mark.parametrize("function", [len, functools.partial(own_signature, 7), lambda org: "x"])
    def test_a_callable_of_another_signature_is_refused(self, function: Any) -> None:
        """It could not be called with what the task is called with."""
        assert "give it the task's own parameters" in str(refused(declare, coalesce_key=function))

    def test_a_callable_without_a_signature_is_taken(self) -> None:
        """There is nothing to be looked at."""
        assert declare(coalesce_key=max).key(("x", "y"), {}) == "y"

    @pytest.mark.parametrize("key", [7, b"org", 1.5, ["org"], {"org": 7}, ("a",), object()])
    def test_a_key_that_is_no_string_is_refused(self, key: Any) -> None:
        """With its type and value."""
        with pytest.raises(InvalidKey, match=f"a key is a string, not {type(key).__name__}") as raised:
            declare(coalesce_key=lambda org_id, kind="full": key).key((1,), {})
        assert isinstance(raised.value, ValueError)
        assert raised.value.value is key

    def test_an_empty_key_is_refused_with_the_remedy(self) -> None:
        """Of a callable, a template or a call."""
        with pytest.raises(InvalidKey, match="may not be empty; return None for a call that is exempt"):
            declare(coalesce_key=lambda org_id, kind="full": "").key((1,), {})
        with pytest.raises(InvalidKey, match="may not be empty"):
            declare(coalesce_key="<org_id>").key(("",), {})

    def test_what_a_callable_raises_is_the_callers(self) -> None:
        """Nothing is hidden."""

        def broken(org_id: Any, kind: str = "full") -> str:
            raise KeyError(org_id)

        with pytest.raises(KeyError):
            declare(coalesce_key=broken).key((1,), {})
