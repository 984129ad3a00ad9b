-- Sets how many runs a constraint lets go on at once, or lets its tasks say so again.
--
-- KEYS: timers, limits, slots, lines
-- ARGV: asked (JSON: id, name and, unless it is given back, limit)
-- Returns: limited, keys that may be able to go on
-- Transition: none
-- Order: the limit before the timer of the first in line, who is then woken whoever dies.
local asked = cjson.decode(ARGV[1])
local timers, limits, slots, lines = KEYS[1], KEYS[2], KEYS[3], KEYS[4]

local packed = redis.call('HGET', limits, asked.id)
local known = packed and cmsgpack.unpack(packed) or {}
known.name, known.set = asked.name, asked.limit
local from, to = '[' .. asked.id .. '/', '(' .. asked.id .. '0'
local first = redis.call('ZRANGEBYLEX', lines, from, to, 'LIMIT', 0, 1)[1]
if known.set or first or redis.call('ZLEXCOUNT', slots, from, to) > 0 then
  redis.call('HSET', limits, asked.id, cmsgpack.pack(known))
else
  redis.call('HDEL', limits, asked.id)
end
if not first then return {'limited'} end
local time = redis.call('TIME')
local state, run_id = first:match('^[^/]*/[^/]*/([^/]*)/(.*)$')
redis.call('ZADD', timers, string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000)), state .. '/' .. run_id)
return {'limited', state}
