"""The record's home: Lua scripts, and the one module that speaks to Redis."""
