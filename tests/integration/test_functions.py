"""Transitions as functions of the server's own: what a server without them does, and one that has lost them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import redis

from celery_coalesce.keys import Names
from celery_coalesce.policy import Policy
from celery_coalesce.records import Push, Timing, Trigger
from celery_coalesce.store.redis import RedisStore
from celery_coalesce.store.scripts import OFTEN, SCRIPTS, script
from celery_coalesce.transitions import Transitions
from tests.integration.driver import in_order
from tests.support.servers import ValkeyServer


def body(key: str) -> None:
    """Take what the triggers pass."""


POLICY = Policy.declare("task", body, False, {"coalesce_key": "<key>"})


@pytest.fixture
def server() -> Iterator[ValkeyServer]:
    """A server that nobody has loaded functions into."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def admin(server: ValkeyServer) -> Iterator[redis.Redis]:
    """Who may do everything."""
    with server.client() as client:
        yield client


@pytest.fixture
def make_transitions(server: ValkeyServer) -> Iterator[Callable[..., Transitions]]:
    """Make an engine with a client of its own, for a user of some name."""
    stores: list[RedisStore] = []

    def make(username: str | None = None) -> Transitions:
        def client() -> Any:
            return server.client(decode_responses=False, username=username, password=username and "secret")

        stores.append(RedisStore(client, Names("", "ns"), "test server"))
        return Transitions(stores[-1], Timing())

    yield make
    for store in stores:
        store.close()


def call(transitions: Transitions, key: str) -> Any:
    """Make a call."""
    return transitions.trigger(POLICY, Trigger(f"id-{key}", key, b"[]"))


def calls(transitions: Transitions, *keys: str) -> list[Any]:
    """Make calls in one go."""
    return in_order(transitions.triggers([(POLICY, Trigger(f"id-{key}", key, b"[]"), None) for key in keys]))


def used(admin: redis.Redis) -> set[str]:
    """Return by which commands transitions were called since it was asked last."""
    stats: Any = admin.info("commandstats")
    admin.config_resetstat()
    return {name.removeprefix("cmdstat_") for name in stats} & {"eval", "evalsha", "fcall"}


def test_a_function_is_loaded_when_it_is_missing(
    make_transitions: Callable[..., Transitions], admin: redis.Redis
) -> None:
    """By the first process that asks; the next finds it. Its name tells its version."""
    assert call(make_transitions(), "a").disposition == "dispatched"
    assert used(admin) == {"fcall"}
    libraries: Any = admin.function_list()
    assert [library[1] for library in libraries] == [script("trigger").function]
    assert str(script("trigger").function).endswith(script("trigger").sha[:12])
    assert calls(make_transitions(), "b", "c", "a")[2].disposition == "coalesced"
    assert used(admin) == {"fcall"}


def test_a_server_that_lets_nobody_call_functions_is_asked_by_scripts(
    make_transitions: Callable[..., Transitions], admin: redis.Redis, caplog: pytest.LogCaptureFixture
) -> None:
    """As one that is older than functions: found out once, and told in the log."""
    caplog.set_level("INFO", "celery_coalesce")
    admin.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "-fcall", "-function")
    transitions = make_transitions("app")
    assert call(transitions, "a").disposition == "dispatched"
    used(admin)
    assert call(transitions, "a").disposition == "coalesced"
    assert {each.disposition.value for each in calls(transitions, "a", "b")} == {"coalesced", "dispatched"}
    assert used(admin) == {"eval", "evalsha"}
    assert [each.action for each in caplog.records if hasattr(each, "action")] == ["scripts"]


def test_a_batch_finds_out_by_itself(make_transitions: Callable[..., Transitions], admin: redis.Redis) -> None:
    """Before it is sent: its calls have an order."""
    admin.execute_command("ACL", "SETUSER", "app", "on", ">secret", "~*", "+@all", "-fcall", "-function")
    assert [each.disposition.value for each in calls(make_transitions("app"), "a", "b")] == ["dispatched"] * 2
    assert used(admin) == {"eval", "evalsha"}


@pytest.mark.parametrize("make", [lambda engine: [call(engine, "b")], lambda engine: calls(engine, "b", "c")])
def test_functions_that_are_gone_are_loaded_again(
    make: Callable[[Transitions], list[Any]], make_transitions: Callable[..., Transitions], admin: redis.Redis
) -> None:
    """Whoever flushed them, nothing is lost and nothing done twice."""
    transitions = make_transitions()
    calls(transitions, "a", "a")
    admin.execute_command("FUNCTION", "FLUSH")
    assert {each.disposition.value for each in make(transitions)} == {"dispatched"}
    assert call(transitions, "a").disposition == "coalesced"
    view = transitions.show("task", "a")
    assert view is not None
    assert [run["triggers"] for run in view.runs] == [3]
    assert len(transitions.busy()) == 1 + len(make(make_transitions()))


def test_one_that_is_gone_is_missed_wherever_it_stands(
    make_transitions: Callable[..., Transitions], admin: redis.Redis
) -> None:
    """A batch may begin with another transition."""
    transitions = make_transitions()

    def make(*keys: str) -> list[Any]:
        pushed, plain = (Trigger(f"id-{key}", key, b"[]") for key in keys)
        asked = [pushed._replace(push=Push("queue", "", "")), plain]
        return in_order(transitions.triggers([(POLICY, trigger, None) for trigger in asked]))

    make("a", "b")
    admin.execute_command("FUNCTION", "DELETE", script("trigger").function)
    assert {each.disposition.value for each in make("c", "d")} == {"dispatched"}
    assert {each.disposition.value for each in make("e", "f")} == {"dispatched"}
    assert admin.llen("queue") == 3
    assert len(admin.function_list()) == 2  # type: ignore[arg-type]


def test_a_mistake_of_one_record_costs_no_function(
    make_transitions: Callable[..., Transitions], admin: redis.Redis
) -> None:
    """Its script fails as well, so it is not the function's."""
    transitions = make_transitions()
    call(transitions, "a")
    admin.set("{ns}:rec:" + next(iter(transitions.busy())), "no record")
    with pytest.raises(Exception, match="refused"):
        call(transitions, "a")
    used(admin)
    assert call(transitions, "b").disposition == "dispatched"
    assert used(admin) == {"fcall"}


def test_constants_are_made_once() -> None:
    """As its functions are, when it is loaded; what is not in capitals, at each call."""
    made, _, called = script("trigger").library.partition("redis.register_function(")
    assert "local USUAL = {__index = {" in made
    assert "USUAL =" not in called
    assert "  head_read, head_changed" in called


def test_only_what_is_asked_for_often_has_a_function() -> None:
    """They stay in the server."""
    assert {name for name in SCRIPTS if script(name).function} == OFTEN
    assert all(len(script(name).library) < 30_000 for name in OFTEN)
