-- Finds what nobody has moved on in time.
--
-- KEYS: meta, presence, timers, drains
-- ARGV: asked (JSON: most)
-- Returns: overdue, presences that ran out, runs whose timer is over, drains not announced
-- Transition: none
-- Order: nothing is written.
local asked = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))

local function due(key)
  return redis.call('ZRANGEBYSCORE', key, '-inf', now, 'LIMIT', 0, asked.most)
end

local grace = tonumber(redis.call('HGET', KEYS[1], 'grace') or '0')
return {'overdue', grace > tonumber(now) and {} or due(KEYS[2]), due(KEYS[3]), due(KEYS[4])}
