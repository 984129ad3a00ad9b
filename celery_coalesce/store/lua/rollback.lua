-- Takes back a dispatch whose publish failed, unless others have joined the run since.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting, drains
-- ARGV: asked (JSON: state, nonce, run, task_id, redispatch, soon, again, triggers, followers (how many of each
--   are the caller's own), announce_in (ms)), drain (what it is announced with, but for its end, which only the record
--   knows)
-- Returns: ended, what is to be sent, drain ('' unless the session has ended, and had had other runs); or unpublished;
--   or gone
-- Transition: dispatched | pending -> (none); or dispatched -> dispatched, to be published again
-- Order: one run is forgotten, or one timer moved. The drain is put aside in the same write: should nobody hear of it,
--   the sweep announces it.
--# include record
--# include slots

local function put_aside(head)
  local known = string.format(', "session_id": %s, "run_index": %d}', head.session, head.index - 1)
  local drain = ARGV[2] .. known
  redis.call('ZADD', KEYS[10], now + asked.announce_in, drain)
  return drain
end

local function rollback()
  local head = read_head()
  local run = head and read_run(asked.run)
  if not run then
    local again = sent_by(head, asked.nonce)
    return again and {'ended', again, ''} or {'gone'}
  end
  if run.task_id ~= asked.task_id or run.index or (run.state ~= 'dispatched' and run.state ~= 'pending') then
    return {'gone'}
  end
  if run.triggers == asked.triggers and run.followers == asked.followers and not run.joined then
    for n = 1, run.followers do redis.call('HDEL', rec, 'fol:' .. acceptance(run) .. ':' .. n) end
    outliving().forget_ticks(run)
    local drained = forget(head, run, false)
    if not drained then
      note_sent(head, asked.nonce)
    elseif head.index > 0 and asked.announce_in then
      return {'ended', sent, put_aside(head)}
    end
    return {'ended', sent, ''}
  end
  run.unpublished = true
  set_timer(run, now + asked.again)
  write_run(run)
  return {'unpublished'}
end

return flush(rollback())
