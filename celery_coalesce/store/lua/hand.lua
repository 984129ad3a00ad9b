-- Hands something to a process that waits for it.
--
-- KEYS: list
-- ARGV: asked (JSON: keep (ms)), what
-- Returns: handed
-- Transition: none
-- Order: one element, however often it is handed; the list goes by itself if nobody takes it.
local asked = cjson.decode(ARGV[1])
redis.call('DEL', KEYS[1])
redis.call('RPUSH', KEYS[1], ARGV[2])
redis.call('PEXPIRE', KEYS[1], asked.keep)
return {'handed'}
