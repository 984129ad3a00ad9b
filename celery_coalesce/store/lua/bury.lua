-- Forgets a presence that holds nothing: one that ran out, or one that says goodbye.
--
-- KEYS: presence, held
-- ARGV: asked (JSON: owner, leaving)
-- Returns: gone, or alive
-- Transition: presence -> (none)
-- Order: one write. A presence that holds a lease stays until it runs out.
local asked = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local expiry = tonumber(redis.call('ZSCORE', KEYS[1], asked.owner) or '0')
local over = expiry <= time[1] * 1000 + math.floor(time[2] / 1000)
if redis.call('SCARD', KEYS[2]) > 0 or not (over or asked.leaving) then return {'alive'} end
redis.call('ZREM', KEYS[1], asked.owner)
return {'gone'}
