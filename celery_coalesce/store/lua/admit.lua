-- Accepts a message that carries no run, or one whose record was lost.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting, seen
-- ARGV: asked (as for trigger, with message (the message's id) and remember (ms)), key, args, call, follower
-- Returns: as trigger; or known, run, task id, attempt (it was admitted before); or gone (it was, and its run ended)
-- Transition: as trigger
-- Order: the tombstone after the run, so that a message is never refused for a run that was not written.
--# include record
--# include slots
--# include accept
--# include seen

local function admit()
  local head = read_head()
  local again = head and repeated_alone(head)
  if again then return told_alone(again) end
  local known = redis.call('HGET', rec, 'msg:' .. asked.message)
  local run = known and read_run(known)
  if run then return {'known', run.id, run.task_id, run.attempt} end
  local seen = KEYS[10]
  if was_seen(seen, asked.message, now) then return {'gone'} end
  local answer = accept()
  if answer[1] == 'merge' or answer[1] == 'rejected' then return told_alone(answer) end
  run = read_run(answer[2])
  -- Done once: there is no run.
  if not run then return told_alone(answer) end
  run.received = true
  if run.task_id == asked.task_id then
    run.message = asked.message
    set('msg:' .. asked.message, run.id)
  end
  write_run(run)
  remember(seen, asked.message, now, asked.remember)
  return told_alone(answer)
end

return flush(admit())
