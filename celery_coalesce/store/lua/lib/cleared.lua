-- What is needed to tell the callers of a cleared run.
local function cleared_run(head, run)
  -- Version 1 of the record knew two ways here, and told them by the reason.
  local outcome = run.outcome or (run.why and 'failed' or 'revoked')
  return {run.id, run.token, run.task_id, run.task, redis.call('HGET', rec, 'call:' .. run.id) or '', head.session,
          run.triggers, head.key, head.scope, run.received and '1' or '0', run.labels or '',
          outcome, run.why or ''}
end

-- unstarted -> cleared: no slot, not to run, its callers to be told by whoever comes at `at`. The timer stands before
-- the run leaves the queue, so that they are told whoever dies. The caller writes the run, and advances the key.
local function take_out(head, run, outcome, why, at)
  -- One that waits for a retry has begun, and is rested from.
  local begun = run.index and head.active[run.id] and true
  if begun and run.cooldown then outliving().rest_from_now(run.cooldown, run.cooldown) end
  release(head, run, begun)
  close(head, run)
  run.state, run.token, run.outcome, run.why = 'cleared', mint(), outcome, why
  set_timer(run, at)
end
