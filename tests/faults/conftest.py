"""Fixtures of the fault tests."""

from __future__ import annotations

from tests.integration.conftest import make_driver, make_site, site

__all__ = ["make_driver", "make_site", "site"]
