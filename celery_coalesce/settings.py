"""The app's ``coalesce_*`` settings, validated all at once."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .errors import SettingError
from .states import Outage

if TYPE_CHECKING:
    from celery import Celery

__all__ = ["SETTINGS", "Settings"]

#: Every setting, with its default.
SETTINGS: dict[str, Any] = {
    "coalesce_redis_url": None,
    "coalesce_namespace": "coalesce",
    "coalesce_lease": 30,
    "coalesce_redispatch_after": 60,
    "coalesce_on_outage": Outage.RAISE.value,
    "coalesce_wait_replicas": 0,
    "coalesce_events": True,
    "coalesce_broker_shortcuts": True,
}


#: Seconds: a day.
LONGEST = 86_400


@dataclass(frozen=True)
class Settings:
    """What the app was configured with. Times are seconds."""

    redis_url: str | None
    namespace: str
    lease: float
    redispatch_after: float
    on_outage: Outage
    #: How many replicas must have a change of the state before anybody acts on it.
    wait_replicas: int
    events: bool
    #: Whether short ways to the broker are taken where it is the server that holds the records.
    broker_shortcuts: bool

    @classmethod
    def of(cls, app: Celery) -> Settings:
        """Read an app's settings.

        Raises:
            SettingError: A setting is unknown or bad.
        """
        # Until something has been read, Celery's settings are pending, and their prefix is not known yet.
        _ = app.conf.broker_url
        conf = app.conf
        for name in _given(conf):
            if name not in SETTINGS:
                close = difflib.get_close_matches(name, list(SETTINGS), n=1)
                remedy = f"did you mean {close[0]!r}?" if close else "known are: " + ", ".join(SETTINGS)
                raise SettingError(name, _harmless(conf.get(name)), "is no setting", remedy)
        given = {name: conf.get(name, default) for name, default in SETTINGS.items()}
        return cls(
            redis_url=_url(given["coalesce_redis_url"]),
            namespace=_namespace(given["coalesce_namespace"]),
            lease=_seconds("coalesce_lease", given["coalesce_lease"], 1),
            redispatch_after=_seconds("coalesce_redispatch_after", given["coalesce_redispatch_after"], 1),
            on_outage=_outage(given["coalesce_on_outage"]),
            wait_replicas=_count("coalesce_wait_replicas", given["coalesce_wait_replicas"]),
            events=_flag("coalesce_events", given["coalesce_events"]),
            broker_shortcuts=_flag("coalesce_broker_shortcuts", given["coalesce_broker_shortcuts"]),
        )


def _harmless(value: object) -> object:
    """Return a value that may be shown: of what could be a URL, nothing that could be its password."""
    return "..." if isinstance(value, str) and "://" in value else value


def _given(conf: Any) -> set[str]:
    """Return the names of the ``coalesce_*`` settings that were made, in whatever form.

    ``conf.maps`` are the layers of the settings (celery.app.utils.Settings, a kombu ChainMap, 5.5-5.7); with a
    namespace (Django's ``CELERY_``) the names in them are upper case and prefixed, or attributes of a module.
    """
    prefix = (conf.prefix or "").lower()
    names = set()
    for layer in conf.maps:
        keys = layer.keys() if isinstance(layer, Mapping) else dir(getattr(layer, "obj", layer))
        for key in keys:
            name = str(key).lower()
            if prefix and name.startswith(prefix):
                name = name[len(prefix) :]
            elif prefix and layer is not conf.changes:
                # A project's own setting, beside those of the namespace.
                continue
            if name.startswith("coalesce_"):
                names.add(name)
    return names


def _seconds(setting: str, value: object, least: float) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= LONGEST:
        raise SettingError(
            setting, value, f"is not a number of seconds from {least} to {LONGEST}", "give such a number"
        )
    return float(value)


def _count(setting: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise SettingError(setting, value, "is not a whole number from 0 on", "give such a number")
    return value


def _namespace(value: object) -> str:
    if not isinstance(value, str) or not value or set("{}\0") & set(value):
        raise SettingError("coalesce_namespace", value, "is not a name", "give a non-empty string without braces")
    return value


def _outage(value: object) -> Outage:
    try:
        return Outage(value)
    except ValueError:
        raise SettingError("coalesce_on_outage", value, "is not known", "use 'raise' or 'publish'") from None


def _flag(setting: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise SettingError(setting, value, "is not a truth value", "use True or False")
    return value


def _url(value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str) or "://" not in value:
        # Never the value itself: it may hold a password.
        raise SettingError("coalesce_redis_url", "...", "is not a URL", "write redis://host:6379/0")
    return value
