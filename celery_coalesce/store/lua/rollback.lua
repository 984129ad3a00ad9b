-- Takes back a dispatch whose publish failed, unless others have joined the run since.
--
-- KEYS: record, waiting, meta, timers, kept, busy, limits, slots, lines, resting
-- ARGV: asked (JSON: state, nonce, run, task_id, redispatch, soon, again, triggers, followers (how many of each
--   are the caller's own))
-- Returns: ended, what is to be sent, session ('' unless it drained after runs), last run index; or unpublished; or
--   gone
-- Transition: dispatched | pending -> (none); or dispatched -> dispatched, to be published again
-- Order: one run is forgotten, or one timer moved.
--# include record
--# include slots

local function rollback()
  local head = read_head()
  local run = head and read_run(asked.run)
  if not run then
    local again = sent_by(head, asked.nonce)
    return again and {'ended', again, '', 0} or {'gone'}
  end
  if run.task_id ~= asked.task_id or run.index or (run.state ~= 'dispatched' and run.state ~= 'pending') then
    return {'gone'}
  end
  if run.triggers == asked.triggers and run.followers == asked.followers and not run.joined then
    for n = 1, run.followers do redis.call('HDEL', rec, 'fol:' .. run.box .. ':' .. n) end
    forget_ticks(run)
    local drained = forget(head, run, false)
    if not drained then note_sent(head, asked.nonce) end
    return {'ended', sent, drained and head.index > 0 and head.session or '', head.index - 1}
  end
  run.unpublished = true
  set_timer(run, now + asked.again)
  write_run(run)
  return {'unpublished'}
end

return rollback()
