-- Notes that a run's message is known not to have been published.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting
-- ARGV: asked (JSON: state, run, again)
-- Returns: unpublished, or gone
-- Transition: dispatched | retrying | pending -> the same, to be published again
-- Order: one timer is moved.
--# include record
local head = read_head()
local run = head and read_run(asked.run)
if not run or run.state == 'running' or run.state == 'cleared' then return {'gone'} end
run.unpublished, run.message_at = true, nil
set_timer(run, math.max(now, run.due) + asked.again)
write_run(run)
return flush({'unpublished'})
