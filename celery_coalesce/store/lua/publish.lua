-- Accepts a call, and pushes the message of its run if that is dispatched at once.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting, queue
-- ARGV: asked (as for trigger), key, args, call, follower, the message up to the run's id, what comes after it
-- Returns: as trigger; of a run whose message was pushed, no message waits (-1)
-- Transition: as trigger
-- Order: the message last: what can not be pushed is published by the caller.
--# include record
--# include slots
--# include accept

local answer, known = accept()
if answer[1] == 'dispatched' then
  -- Asked again because its reply was lost, it was pushed the first time.
  local pushed = known or redis.pcall('LPUSH', KEYS[10], ARGV[6] .. answer[2] .. ARGV[7])
  if type(pushed) ~= 'table' then answer[4] = -1 end
end
return flush(told(answer))
