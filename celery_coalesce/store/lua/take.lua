-- Takes a recorded drain out of the store, for whoever announces it.
--
-- KEYS: meta, drains
-- ARGV: asked (JSON: by (who takes it: repeated, it gets the same answer)), drain
-- Returns: taken; or gone, by another or for ever
-- Transition: none
-- Order: one write of each; who took the last ones is remembered, so that a repeated call is known again.
local MOST = 256

local asked = cjson.decode(ARGV[1])
local packed = redis.call('HGET', KEYS[1], 'takers')
local takers = packed and cmsgpack.unpack(packed) or {}
for _, taker in ipairs(takers) do
  if taker == asked.by then return {'taken'} end
end
if redis.call('ZREM', KEYS[2], ARGV[2]) == 0 then return {'gone'} end
if #takers == MOST then table.remove(takers, 1) end
takers[#takers + 1] = asked.by
redis.call('HSET', KEYS[1], 'takers', cmsgpack.pack(takers))
return {'taken'}
