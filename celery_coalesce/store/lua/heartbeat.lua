-- Renews the presence of a worker process.
--
-- KEYS: meta, presence, timers, drains
-- ARGV: asked (JSON: owner, lease)
-- Returns: renewed, ms until something is overdue (-1: nothing in sight)
-- Transition: presence -> presence
-- Order: grace before beat, so that a gap that was seen is never forgotten.
local asked = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)

local function whole(number)
  return string.format('%.0f', number)
end

-- Nobody has been heard for a lease: nobody could be. Whoever is alive gets the time to say so.
local beat = tonumber(redis.call('HGET', KEYS[1], 'beat') or now)
if now - beat > asked.lease then redis.call('HSET', KEYS[1], 'grace', whole(now + asked.lease)) end
redis.call('HSET', KEYS[1], 'beat', whole(now))
redis.call('ZADD', KEYS[2], now + asked.lease, asked.owner)

local next_at = math.huge
for position = 2, 4 do
  local first = redis.call('ZRANGE', KEYS[position], 0, 0, 'WITHSCORES')
  if first[2] then
    local at = tonumber(first[2])
    if position == 2 then at = math.max(at, tonumber(redis.call('HGET', KEYS[1], 'grace') or '0')) end
    next_at = math.min(next_at, at)
  end
end
return {'renewed', next_at == math.huge and -1 or math.max(next_at - now, 0)}
