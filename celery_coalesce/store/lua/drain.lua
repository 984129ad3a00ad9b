-- Takes a recorded drain out of the store, for the process that announces it.
--
-- KEYS: drains, seen
-- ARGV: asked (JSON: nonce, remember (ms)), drain
-- Returns: drained (it is the caller's to announce); or gone (another has it)
-- Transition: drained -> (none)
-- Order: one write. Who has taken it is remembered: asked again because the answer was lost, it is the caller's still.
--# include seen

local drains, seen = KEYS[1], KEYS[2]
local asked = cjson.decode(ARGV[1])

local function drain()
  local time = redis.call('TIME')
  local now = time[1] * 1000 + math.floor(time[2] / 1000)
  local call = 'drain/' .. redis.sha1hex(asked.nonce .. ARGV[2])
  if redis.call('ZREM', drains, ARGV[2]) == 1 then
    remember(seen, call, now, asked.remember)
    return {'drained'}
  end
  return {was_seen(seen, call, now) and 'drained' or 'gone'}
end

return drain()
