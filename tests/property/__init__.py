"""The record against a model of what it promises."""
