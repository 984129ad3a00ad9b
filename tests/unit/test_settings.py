"""The app's settings: however they are spelt, and what is said of those that make no sense."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from celery import Celery
from celery._state import _deregister_app
from celery.exceptions import ImproperlyConfigured

from celery_coalesce.engine import engine_of
from celery_coalesce.errors import SettingError
from celery_coalesce.settings import SETTINGS, Settings
from celery_coalesce.states import Outage
from celery_coalesce.store.redis import connect
from tests.unit.isolated import run_python


@pytest.fixture
def make_app() -> Iterator[Callable[..., Celery]]:
    """Make an app that no other test meets, with settings."""
    apps: list[Celery] = []

    def make(broker: str = "redis://localhost/0", backend: str | None = None, **conf: Any) -> Celery:
        app = Celery("unit", broker=broker, backend=backend, set_as_current=False)
        app.conf.update(conf)
        apps.append(app)
        return app

    yield make
    for app in apps:
        app.close()
        _deregister_app(app)


MakeApp = Callable[..., Celery]


def refused(app: Celery) -> SettingError:
    """Return the error that an app's settings are refused with."""
    with pytest.raises(SettingError) as raised:
        connect(app, Settings.of(app))
    error = raised.value
    assert isinstance(error, ImproperlyConfigured)
    assert str(error).startswith(f"{error.setting}=")
    assert "; " in str(error)
    return error


class TestValues:
    def test_defaults(self, make_app: MakeApp) -> None:
        """An app without settings."""
        settings = Settings.of(make_app())
        assert settings.redis_url is None
        assert settings.namespace == "coalesce"
        assert (settings.lease, settings.redispatch_after) == (30, 60)
        assert settings.on_outage is Outage.RAISE
        assert settings.wait_replicas == 0
        assert settings.events

    def test_every_setting_is_read(self, make_app: MakeApp) -> None:
        """And taken as it is."""
        settings = Settings.of(
            make_app(
                coalesce_redis_url="redis://elsewhere:1/2",
                coalesce_namespace="mine",
                coalesce_lease=2.5,
                coalesce_redispatch_after=7,
                coalesce_on_outage="publish",
                coalesce_wait_replicas=2,
                coalesce_events=False,
            )
        )
        assert settings.redis_url == "redis://elsewhere:1/2"
        assert settings.namespace == "mine"
        assert (settings.lease, settings.redispatch_after) == (2.5, 7)
        assert settings.on_outage is Outage.PUBLISH
        assert settings.wait_replicas == 2
        assert not settings.events

    @pytest.mark.parametrize(
        ("setting", "value", "remedy"),
        [
            ("coalesce_namespace", "", "non-empty string without braces"),
            ("coalesce_namespace", "{x}", "non-empty string without braces"),
            ("coalesce_namespace", 7, "non-empty string without braces"),
            ("coalesce_namespace", None, "non-empty string without braces"),
            ("coalesce_namespace", "a\0b", "non-empty string without braces"),
            ("coalesce_lease", 0, "give such a number"),
            ("coalesce_lease", -5, "give such a number"),
            ("coalesce_lease", "30", "give such a number"),
            ("coalesce_lease", True, "give such a number"),
            ("coalesce_lease", None, "give such a number"),
            ("coalesce_lease", float("nan"), "give such a number"),
            ("coalesce_lease", float("inf"), "give such a number"),
            ("coalesce_lease", 10**9, "give such a number"),
            ("coalesce_redispatch_after", 0, "give such a number"),
            ("coalesce_redispatch_after", "60", "give such a number"),
            ("coalesce_on_outage", "ignore", "use 'raise' or 'publish'"),
            ("coalesce_on_outage", None, "use 'raise' or 'publish'"),
            ("coalesce_on_outage", ["raise"], "use 'raise' or 'publish'"),
            ("coalesce_wait_replicas", -1, "give such a number"),
            ("coalesce_wait_replicas", True, "give such a number"),
            ("coalesce_wait_replicas", "1", "give such a number"),
            ("coalesce_wait_replicas", 1.0, "give such a number"),
            ("coalesce_wait_replicas", None, "give such a number"),
            ("coalesce_events", "yes", "use True or False"),
            ("coalesce_events", 1, "use True or False"),
        ],
    )
    def test_a_bad_value_is_refused(self, make_app: MakeApp, setting: str, value: Any, remedy: str) -> None:
        """By name, with its value and a remedy."""
        error = refused(make_app(**{setting: value}))
        assert error.setting == setting
        assert repr(value) in str(error)
        assert remedy in str(error)

    @pytest.mark.parametrize(
        "url",
        [
            7, "", "localhost", "localhost:6379", "redis://localhost:port/0", "redis://localhost:99999/0",
            "http://localhost/", "amqp://user:secret@localhost//", "redis://[::1/0",
            "sentinel://localhost:26379", "sentinel://localhost:x/primary", "sentinel://localhost/primary?db=x",
            "sentinel://localhost/primary?typo=1", "redis://u:secret@localhost:port/0",
            "sentinel://:secret@localhost:x/primary", "redis+cluster://:secret@localhost:x",
        ],
    )  # fmt: skip
    def test_a_bad_url_is_refused_without_its_password(self, make_app: MakeApp, url: Any) -> None:
        """What can not be read is refused when the settings are read, not at some later call."""
        error = refused(make_app(coalesce_redis_url=url))
        assert error.setting == "coalesce_redis_url"
        assert "secret" not in str(error)
        assert "secret" not in repr(error)

    @pytest.mark.parametrize(
        ("url", "shown"),
        [
            ("redis://localhost:6379/0", "redis://localhost:6379/0"),
            ("redis://u:secret@localhost:6379/0", "redis://u:**@localhost:6379/0"),
            ("rediss://:secret@host:1/0?ssl_cert_reqs=none", "rediss://:**@host:1/0"),
            ("valkey://host:1", "valkey://host:1"),
            ("valkeys://host:1", "valkeys://host:1"),
            ("unix://:secret@/tmp/socket?db=3", "unix://:**@/tmp/socket"),
            ("redis+socket:///tmp/socket", None),
            ("unix:///tmp/socket?db=3", None),
            ("redis+cluster://:secret@host:1", "redis+cluster://:**@host:1"),
            ("rediss+cluster://host:1", "rediss+cluster://host:1"),
            ("sentinel://:secret@h:1/primary?sentinel_password=secret", "sentinel://:**@h:1/primary"),
            ("sentinel://a:1;sentinel://:secret@b:2/primary", None),
        ],
    )
    def test_a_good_url_is_taken_and_shown_without_its_password(
        self, make_app: MakeApp, url: str, shown: str | None
    ) -> None:
        """No connection is made."""
        app = make_app(coalesce_redis_url=url)
        address = connect(app, Settings.of(app)).address
        assert "secret" not in address
        assert shown is None or address.rstrip("/") == shown


class TestUnknown:
    @pytest.mark.parametrize(
        ("setting", "remedy"),
        [
            ("coalesce_leese", "did you mean 'coalesce_lease'?"),
            ("coalesce_url", "did you mean 'coalesce_redis_url'?"),
            ("coalesce_$$$$$$$$$$$$$", "known are: coalesce_redis_url, "),
        ],
    )
    def test_an_unknown_setting_is_refused_with_a_hint(self, make_app: MakeApp, setting: str, remedy: str) -> None:
        """A misspelt setting is never ignored."""
        error = refused(make_app(**{setting: 1}))
        assert error.setting == setting
        assert "is no setting" in str(error)
        assert remedy in str(error)

    def test_celerys_own_settings_are_left_alone(self, make_app: MakeApp) -> None:
        """Whatever they are called."""
        Settings.of(make_app(task_default_queue="coalesce", worker_concurrency=1, my_coalesce_thing=2))

    def test_an_unset_secret_is_not_shown(self, make_app: MakeApp) -> None:
        """An unknown setting that looks like a URL keeps its password."""
        error = refused(make_app(coalesce_redis_uri="redis://:secret@localhost/0"))
        assert "secret" not in str(error)


class TestWhereTheyComeFrom:
    @pytest.mark.parametrize("kind", ["module", "class", "mapping"])
    def test_a_config_object(self, make_app: MakeApp, kind: str) -> None:
        """`config_from_object`, of any kind."""
        given: dict[str, Any] = {"coalesce_lease": 5, "broker_url": "redis://localhost/0"}
        config: Any = given
        if kind == "module":
            config = types.ModuleType("config")
            vars(config).update(given)
        elif kind == "class":
            config = type("Config", (), given)
        app = make_app()
        app.config_from_object(config)
        assert Settings.of(app).lease == 5

    def test_django_settings(self, make_app: MakeApp) -> None:
        """`namespace="CELERY"`: upper case and prefixed; the project's own names are not ours."""
        config = types.ModuleType("settings")
        vars(config).update(
            CELERY_BROKER_URL="redis://localhost/3",
            CELERY_COALESCE_LEASE=5,
            CELERY_COALESCE_ON_OUTAGE="publish",
            COALESCE_SOMETHING_OF_THEIRS=1,
            coalesce_theirs=2,
        )
        app = make_app()
        app.config_from_object(config, namespace="CELERY")
        settings = Settings.of(app)
        assert settings.lease == 5
        assert settings.on_outage is Outage.PUBLISH

    def test_a_misspelt_django_setting(self, make_app: MakeApp) -> None:
        """Is refused as well, by the name that Celery gives it."""
        config = types.ModuleType("settings")
        vars(config).update(CELERY_BROKER_URL="redis://localhost/3", CELERY_COALESCE_LEESE=5)
        app = make_app()
        app.config_from_object(config, namespace="CELERY")
        assert "did you mean 'coalesce_lease'?" in str(refused(app))

    def test_a_bad_django_setting(self, make_app: MakeApp) -> None:
        """Its value is told."""
        config = types.ModuleType("settings")
        vars(config).update(CELERY_BROKER_URL="redis://localhost/3", CELERY_COALESCE_LEASE="soon")
        app = make_app()
        app.config_from_object(config, namespace="CELERY")
        assert "'soon'" in str(refused(app))

    def test_real_django_settings(self) -> None:
        """Django's own lazy settings object, as in every Celery project under Django."""
        run_python(
            """
            from django.conf import settings
            settings.configure(
                CELERY_BROKER_URL="redis://localhost/3", CELERY_COALESCE_LEASE=5, COALESCE_THEIRS=1,
            )
            from celery import Celery
            from celery_coalesce.errors import SettingError
            from celery_coalesce.settings import Settings
            app = Celery("x")
            app.config_from_object("django.conf:settings", namespace="CELERY")
            assert Settings.of(app).lease == 5

            settings.CELERY_COALESCE_LEESE = 3
            other = Celery("y")
            other.config_from_object("django.conf:settings", namespace="CELERY")
            try:
                Settings.of(other)
            except SettingError as error:
                assert "coalesce_lease" in str(error)
            else:
                raise AssertionError("ignored")
            """
        )

    def test_an_environment_of_upper_case_names(self, make_app: MakeApp) -> None:
        """Every setting may be spelt in Django's way."""
        config = types.ModuleType("settings")
        for name, value in SETTINGS.items():
            setattr(config, f"CELERY_{name.upper()}", value)
        app = make_app()
        app.config_from_object(config, namespace="CELERY")
        assert Settings.of(app) == Settings.of(make_app())


class TestWhichServer:
    def test_the_broker_if_it_is_a_redis(self, make_app: MakeApp) -> None:
        """With its prefix."""
        app = make_app(
            "redis://:secret@localhost:1/2",
            "redis://localhost:9/9",
            broker_transport_options={"global_keyprefix": "pre:"},
        )
        store = connect(app, Settings.of(app))
        assert store.address == "redis://:**@localhost:1/2"
        assert store.names.meta == "pre:{coalesce}:meta"

    def test_the_first_of_a_list_of_brokers(self, make_app: MakeApp) -> None:
        """As kombu connects."""
        for broker in ("redis://a:1/0;redis://b:2/0", ["redis://a:1/0", "redis://b:2/0"]):
            app = make_app()
            app.conf.broker_url = broker
            assert connect(app, Settings.of(app)).address == "redis://a:1/0"

    def test_else_the_result_backend(self, make_app: MakeApp) -> None:
        """With its own prefix."""
        app = make_app(
            "amqp://localhost//",
            "redis://localhost:9/9",
            result_backend_transport_options={"global_keyprefix": "back:"},
        )
        store = connect(app, Settings.of(app))
        assert store.address == "redis://localhost:9/9"
        assert store.names.meta == "back:{coalesce}:meta"

    def test_the_url_before_either(self, make_app: MakeApp) -> None:
        """And no prefix of theirs."""
        app = make_app(broker_transport_options={"global_keyprefix": "pre:"}, coalesce_redis_url="redis://own:1/0")
        store = connect(app, Settings.of(app))
        assert (store.address, store.names.meta) == ("redis://own:1/0", "{coalesce}:meta")

    @pytest.mark.parametrize(
        ("broker", "backend"),
        [
            ("amqp://localhost//", None),
            ("memory://", "rpc://"),
            ("sqs://", "db+sqlite://"),
            ("memory://", "cache+memory://"),
        ],
    )
    def test_else_there_is_none(self, make_app: MakeApp, broker: str, backend: str | None) -> None:
        """A clear error with the remedy."""
        error = refused(make_app(broker, backend))
        assert "neither the broker nor the result backend is a Redis or Valkey" in str(error)
        assert "set coalesce_redis_url" in str(error)

    def test_the_engine_is_made_once(self, make_app: MakeApp) -> None:
        """And remembers for twice the visibility timeout."""
        app = make_app(broker_transport_options={"visibility_timeout": 50})
        assert engine_of(app) is engine_of(app)
        assert engine_of(app).transitions.timing.remember == 100_000
