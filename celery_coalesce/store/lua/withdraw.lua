-- Takes out a run whose message can not be made, whenever it is tried.
--
-- KEYS: record, waiting, meta, timers
-- ARGV: asked (JSON: state, run, why, redispatch)
-- Returns: cleared, envelopes to publish; or gone
-- Transition: dispatched | retrying | pending -> cleared, for the sweep to tell its callers why
-- Order: the timer before the run leaves the queue, so that its callers are told whoever dies.
--# include record
local head = read_head()
local run = head and read_run(asked.run)
if not run or run.state == 'running' or run.state == 'cleared' then return {'gone'} end
run.state, run.token, run.why = 'cleared', mint(), asked.why
set_timer(run, now)
redis.call('ZREM', wait, run.id)
close(head, run)
head.active[run.id] = nil
write_run(run)
local sent = promote(head)
write_head(head)
return {'cleared', sent}
