-- Accepts a call, or some of one key, and pushes the message of the first one's run if that is dispatched at once.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting, queue
-- ARGV: as for trigger; the message up to the run's id, what comes after it
-- Returns: as trigger; of a run whose message was pushed, no message waits (-1)
-- Transition: as trigger
-- Order: the message last: what can not be pushed is published by the caller.
--# include record
--# include slots
--# include accept

local function push(answer, known_before)
  if answer[1] ~= 'dispatched' then return end
  -- Asked again because its reply was lost, it was pushed the first time.
  local pushed = known_before or redis.pcall('LPUSH', KEYS[10], ARGV[#ARGV - 1] .. answer[2] .. ARGV[#ARGV])
  if type(pushed) ~= 'table' then answer[4] = -1 end
end

return flush(accept_all(push))
