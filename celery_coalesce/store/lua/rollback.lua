-- Takes back a dispatch whose publish failed, unless others have joined the run since.
--
-- KEYS: record, waiting, meta, timers
-- ARGV: asked (JSON: state, run, task_id, redispatch, again)
-- Returns: ended, 1 if nothing is left, envelopes to publish; or unpublished; or gone
-- Transition: dispatched | pending -> (none); or dispatched -> dispatched, to be published again
-- Order: one run is forgotten, or one timer moved.
--# include record
local head = read_head()
local run = head and read_run(asked.run)
if not run or run.task_id ~= asked.task_id or run.index or (run.state ~= 'dispatched' and run.state ~= 'pending') then
  return {'gone'}
end
if run.triggers == 1 and run.followers == 0 then
  local drained, sent = forget(head, run)
  return {'ended', drained and '1' or '0', sent}
end
run.unpublished = true
set_timer(run, now + asked.again)
write_run(run)
return {'unpublished'}
