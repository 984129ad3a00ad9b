-- Carries the triggers that had joined a revoked run over to a new run of the key.
--
-- KEYS: record, waiting, meta, timers
-- ARGV: asked (JSON: state, nonce, run, task_id, new_task_id, redispatch), call (without the revoked caller's own
--   callbacks)
-- Returns: dispatched, envelopes to publish; or gone
-- Transition: dispatched -> (none), and its joined triggers -> dispatched | pending
-- Order: the new run before the old one goes.
--# include record
local head = read_head()
local old = head and read_run(asked.run)
if not old then
  local again = dispatched_by(head, asked.nonce)
  return again and {'dispatched', again} or {'gone'}
end
if old.task_id ~= asked.task_id or old.state == 'running' or old.state == 'cleared' then return {'gone'} end
local run = cmsgpack.unpack(cmsgpack.pack(old))
run.id, run.task_id, run.message = mint(), asked.new_task_id, nil
run.triggers = math.max(old.triggers - 1, 1)
run.losses, run.unpublished = 0, nil
redis.call('HSET', rec, 'args:' .. run.id, redis.call('HGET', rec, 'args:' .. old.id))
if ARGV[2] ~= '' then redis.call('HSET', rec, 'call:' .. run.id, ARGV[2]) end
head.runs = head.runs + 1
local open = head.open[run.task]
for position, run_id in ipairs(open or {}) do
  if run_id == old.id then open[position] = run.id end
end
if head.lone[run.task] == old.id then head.lone[run.task] = run.id end
local held_slot = head.active[old.id]
head.active[old.id] = nil
if held_slot or (none_waiting() and fits(head, run.limit)) then
  dispatch(head, run)
else
  run.state = 'pending'
  redis.call('ZADD', wait, run.seq, run.id)
end
write_run(run)
local _, sent = forget(head, old)
if run.state == 'dispatched' then sent[#sent + 1] = envelope(run) end
note_dispatched(head, asked.nonce, sent)
return {'dispatched', sent}
