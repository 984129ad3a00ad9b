-- Takes out a run whose message can not be made, whenever it is tried.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting
-- ARGV: asked (JSON: state, nonce, run, why, redispatch, soon)
-- Returns: cleared, what is to be sent; or gone
-- Transition: dispatched | retrying | pending -> cleared, for the sweep to tell its callers why
-- Order: the timer before the run leaves the queue, so that its callers are told whoever dies.
--# include record
--# include slots
--# include cleared
local head = read_head()
local run = head and read_run(asked.run)
if sent_by(head, asked.nonce) then return flush({'cleared', sent}) end
if not run or run.state == 'running' or run.state == 'cleared' then return {'gone'} end
take_out(head, run, 'failed', asked.why, now)
write_run(run)
advance(head)
note_sent(head, asked.nonce)
return flush({'cleared', sent})
