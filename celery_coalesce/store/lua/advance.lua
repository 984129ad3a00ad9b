-- Lets a key's waiting runs have what somebody of another key gave way.
--
-- KEYS: record, waiting, meta, timers, kept, busy, limits, slots, lines, resting
-- ARGV: asked (JSON: state, redispatch, soon)
-- Returns: dispatched, what is to be sent
-- Transition: pending and due -> dispatched
-- Order: as in wake; what is not done here is done at the waiting run's timer.
--# include record
--# include slots
local head = read_head()
if head then
  advance(head)
  write_head(head)
end
return {'dispatched', sent}
