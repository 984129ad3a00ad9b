-- Reads the constraints that are in use or have a limit of their own, a page at a time.
--
-- KEYS: limits, slots, lines, resting
-- ARGV: asked (JSON: cursor)
-- Returns: constraints, next cursor, and of each: name, limit that its tasks declare, limit that was set (-1: none),
--   runs that hold a slot, runs that wait, ms until it has rested
-- Transition: none
-- Order: nothing is written.
local asked = cjson.decode(ARGV[1])
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local page = redis.call('HSCAN', KEYS[1], asked.cursor, 'COUNT', 100)
local found = {'constraints', page[1]}
for position = 1, #page[2], 2 do
  local id, known = page[2][position], cmsgpack.unpack(page[2][position + 1])
  local from, to = '[' .. id .. '/', '(' .. id .. '0'
  local rested = tonumber(redis.call('ZSCORE', KEYS[4], id) or '0')
  found[#found + 1] = {known.name, known.limit or -1, known.set or -1, redis.call('ZLEXCOUNT', KEYS[2], from, to),
                       redis.call('ZLEXCOUNT', KEYS[3], from, to), math.max(rested - now, 0)}
end
return found
