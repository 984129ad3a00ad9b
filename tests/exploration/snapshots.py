"""The store as a value: the real scripts, each run upon a snapshot, giving the next snapshot and the reply.

One round trip puts the snapshot into an embedded server, runs the script, and reads everything back. The scripts are
the package's own, text for text, but for the clock: `TIME` is the constant `NOW`, and time passes by moving all times
that are stored into the past (`aged`). What was computed once is remembered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import msgpack
import redis

from celery_coalesce.keys import Names
from celery_coalesce.store.scripts import script

TIME = "redis.call('TIME')"

#: What the scripts take for the present, in milliseconds, and in microseconds: the least number that they give out.
NOW = 1_700_000_000_000
FIRST = NOW * 1000

#: The broker's queue, as far as scripts push to it. Whoever runs a script takes out what that has pushed.
QUEUE = "queue"

#: Written, and never read by a transition: left out, or states would differ by how many runs came before.
UNREAD = ("history",)
#: A digest would hide the names in it, which are exchanged.
DIGEST, WHOLE = "redis.sha1hex(asked.nonce .. ARGV[2])", "(asked.nonce .. ARGV[2])"

AROUND = """
local function transition(KEYS, ARGV)
%s
end
local WRITE = {hash = 'HSET', zset = 'ZADD', set = 'SADD'}
local READ = {hash = 'HGETALL', set = 'SMEMBERS'}
redis.call('FLUSHDB')
for _, key in ipairs(cmsgpack.unpack(ARGV[1])) do redis.call(WRITE[key[2]], key[1], unpack(key[3])) end
local argv = {}
for position = 2, #ARGV do argv[position - 1] = ARGV[position] end
local reply = transition(KEYS, argv)
local after = {}
for _, name in ipairs(redis.call('KEYS', '*')) do
  local kind = redis.call('TYPE', name).ok
  local found
  if kind == 'zset' then
    found = redis.call('ZRANGE', name, 0, -1, 'WITHSCORES')
  elseif kind == 'list' then
    found = redis.call('LRANGE', name, 0, -1)
  else
    found = redis.call(READ[kind], name)
  end
  after[#after + 1] = {name, kind, found}
end
return {cmsgpack.pack(after), reply}
"""

#: What is stored: by the key's name without its prefix, hashes and sorted sets as dicts, sets as dicts of nothing.
Content = dict[str, dict[Any, Any]]
#: Content, canonically packed.
Snapshot = bytes


def pack(value: Any) -> bytes:
    return bytes(msgpack.packb(value, use_bin_type=True))


def unpack(blob: bytes) -> Any:
    return msgpack.unpackb(blob, raw=False, strict_map_key=False)


def _read_lua(blob: bytes) -> Any:
    return msgpack.unpackb(blob, raw=True, strict_map_key=False)


def _sorted(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _sorted(value[name]) for name in sorted(value)}
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return value


def _is_packed(name: str, field: bytes) -> bool:
    return (name.startswith("rec:") and (field == b"head" or field.startswith(b"run:"))) or name.startswith("kept:")


def _kind(name: str) -> str:
    first = name.split(":", 1)[0]
    if first in ("rec", "meta", "kept", "limits"):
        return "hash"
    return "set" if first == "held" else "zset"


class Snapshots:
    """Runs transitions upon snapshots.

    Args:
        client: A client of the embedded server, whose database is nobody else's.
        names: The names of everything in Redis.
        mutate: Changes a script's text, to see that this is found.
    """

    def __init__(
        self, client: redis.Redis, names: Names, mutate: Callable[[str, str], str] = lambda name, text: text
    ) -> None:
        self.names = names
        self.calls = 0
        self._client = client
        self._mutate = mutate
        self._shas: dict[str, str] = {}
        self._known: dict[bytes, tuple[Snapshot, Any]] = {}

    @cached_property
    def _prefix(self) -> str:
        return self.names.meta.removesuffix("meta")

    def _sha(self, name: str) -> str:
        if name not in self._shas:
            text = self._mutate(name, script(name).text)
            # Expiry is the server's own clock's; what has a time to live is looked at before it is believed.
            text = text.replace(TIME, f"{{{NOW // 1000}, 0}}").replace("'PEXPIREAT'", "'TOUCH'")
            text = text.replace(DIGEST, WHOLE).replace("'PEXPIRE'", "'TOUCH'").replace("'PERSIST'", "'TOUCH'")
            self._shas[name] = str(self._client.script_load(AROUND % text))
        return self._shas[name]

    def call(self, snapshot: Snapshot, name: str, keys: Sequence[str], argv: Sequence[Any]) -> tuple[Snapshot, Any]:
        """Run a transition; return what is stored afterwards, and the reply."""
        asked = pack([snapshot, name, argv, keys])
        known = self._known.get(asked)
        if known is None:
            self.calls += 1
            packed, reply = self._client.evalsha(self._sha(name), len(keys), *keys, self._stored(snapshot), *argv)
            known = self._known[asked] = (self._taken(packed), reply)
        return known

    def _stored(self, snapshot: Snapshot) -> bytes:
        stored = []
        for name, content in unpack(snapshot).items():
            kind = _kind(name)
            flat: list[Any] = []
            for field, value in content.items():
                if kind == "hash":
                    packs = _is_packed(name, field)
                    flat += [field, msgpack.packb(value, use_bin_type=False) if packs else value]
                else:
                    flat += [value if isinstance(value, bytes) else b"%d" % value, field] if kind == "zset" else [field]
            stored.append([(self._prefix + name).encode(), kind, flat])
        return bytes(msgpack.packb(stored, use_bin_type=False))

    def _taken(self, packed: bytes) -> Snapshot:
        content: Content = {}
        for full, stored, flat in _read_lua(packed):
            name = full.decode().removeprefix(self._prefix)
            if name in UNREAD:
                continue
            if stored == b"list":
                content[name] = dict.fromkeys(flat, 0)
                continue
            kind = _kind(name)
            if kind == "set":
                content[name] = dict.fromkeys(sorted(flat), 0)
                continue
            pairs = list(zip(flat[::2], flat[1::2], strict=True))
            if kind == "zset":
                # Times are numbers; whatever else is a score is one that was given out, and stays a text.
                clock = name in CLOCKS
                content[name] = {member: int(score) if clock else score for member, score in pairs}
            else:
                content[name] = {
                    field: _sorted(_read_lua(value)) if _is_packed(name, field) else value
                    for field, value in sorted(pairs)
                }
        return pack({name: content[name] for name in sorted(content)})


#: Where times are, besides the scores of these: in milliseconds.
CLOCKS = ("timers", "presence", "drains", "resting", "seen")
RUN_TIMES = (b"due", b"latest", b"expires", b"message_at", b"stop_at")
KEPT_TIMES = (b"from", b"till", b"at")


def aged(snapshot: Snapshot, passed: int) -> Snapshot:
    """Return what is stored as it looks some milliseconds later. Of what is past, how long ago is not kept."""
    content: Content = unpack(snapshot)

    def earlier(at: int) -> int:
        return max(at - passed, NOW)

    for name, items in content.items():
        if name in CLOCKS:
            content[name] = {member: earlier(at) for member, at in items.items()}
            if name == "seen":
                content[name] = {member: at for member, at in content[name].items() if at > NOW}
        for field, value in items.items():
            if name.startswith("rec:") and (field == b"head" or field.startswith(b"run:")):
                for time in (*RUN_TIMES, b"batch_till"):
                    if time in value:
                        value[time] = earlier(value[time])
            elif name.startswith("kept:"):
                for time in KEPT_TIMES:
                    if time in value:
                        value[time] -= passed
            elif name == "meta" and field == b"grace":
                items[field] = b"%d" % earlier(int(value))
    return pack({name: items for name, items in content.items() if items or name != "seen"})
