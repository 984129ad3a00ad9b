-- Reads which runs are in one of the indexes that every busy key has a run in, a page at a time.
--
-- KEYS: index
-- ARGV: asked (JSON: cursor)
-- Returns: keys, next cursor, and names of runs
-- Transition: none
-- Order: nothing is written.
local asked = cjson.decode(ARGV[1])
local timed = redis.call('TYPE', KEYS[1]).ok == 'zset'
local page = redis.call(timed and 'ZSCAN' or 'SSCAN', KEYS[1], asked.cursor, 'COUNT', 100)
local reply = {'keys', page[1]}
for position = 1, #page[2], timed and 2 or 1 do reply[#reply + 1] = page[2][position] end
return reply
