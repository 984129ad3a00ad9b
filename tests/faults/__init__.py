"""Servers, networks, clocks and versions that fail: what is promised of each."""
