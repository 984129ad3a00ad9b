-- Carries the triggers that had joined a revoked run over to a new run of the key.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting
-- ARGV: asked (JSON: state, nonce, run, task_id, new_task_id, redispatch, soon), call (without the revoked caller's own
--   callbacks)
-- Returns: dispatched, what is to be sent; or gone
-- Transition: dispatched -> (none), and its joined triggers -> dispatched | pending
-- Order: the new run before the old one goes.
--# include record
--# include slots

local function carry()
  local head = read_head()
  local old = head and read_run(asked.run)
  if not old then
    local again = sent_by(head, asked.nonce)
    return again and {'dispatched', again} or {'gone'}
  end
  if old.task_id ~= asked.task_id or old.state == 'running' or old.state == 'cleared' then return {'gone'} end
  release(head, old, false)
  local run = unpacked(old.id, cmsgpack.pack(old))
  run.seq = acceptance(old)
  run.id, run.task_id, run.message = mint(), asked.new_task_id, nil
  run.triggers = math.max(old.triggers - 1, 1)
  run.state, run.losses, run.unpublished, run.unsent, run.message_at = 'pending', 0, nil, nil, nil
  set('args:' .. run.id, redis.call('HGET', rec, 'args:' .. old.id))
  if ARGV[2] ~= '' then set('call:' .. run.id, ARGV[2]) end
  head.runs = head.runs + 1
  local open = head.open[run.task]
  for position, run_id in ipairs(open or {}) do
    if run_id == old.id then open[position] = run.id end
  end
  if head.lone and head.lone[run.task] == old.id then head.lone[run.task] = run.id end
  write_run(run)
  -- In the old one's place, by its acceptance.
  wait_in_turn(run)
  forget(head, old, false)
  note_sent(head, asked.nonce)
  return {'dispatched', sent}
end

return flush(carry())
