-- Reads which keys are busy, the oldest session first.
--
-- KEYS: busy
-- ARGV: asked (JSON: after (a session, or ''), most)
-- Returns: keys, and of each: state id, session
-- Transition: none
-- Order: nothing is written.
local asked = cjson.decode(ARGV[1])
local from = asked.after == '' and '-inf' or '(' .. asked.after
local found = redis.call('ZRANGEBYSCORE', KEYS[1], from, '+inf', 'WITHSCORES', 'LIMIT', 0, asked.most)
local reply = {'keys'}
for position = 1, #found, 2 do
  reply[#reply + 1] = {found[position], string.format('%.0f', found[position + 1])}
end
return reply
