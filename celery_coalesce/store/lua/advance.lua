-- Lets a key's waiting runs have what somebody of another key gave way.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting
-- ARGV: asked (JSON: state, nonce, redispatch, soon)
-- Returns: dispatched, what is to be sent
-- Transition: pending and due -> dispatched
-- Order: as in wake; what is not done here is done at the waiting run's timer.
--# include record
--# include slots
local head = read_head()
if head and not sent_by(head, asked.nonce) then
  advance(head)
  note_sent(head, asked.nonce)
end
return flush({'dispatched', sent})
