-- What is needed to tell the callers of a cleared run.
local function cleared_run(head, run)
  return {run.id, run.token, run.task_id, run.task, redis.call('HGET', rec, 'call:' .. run.id) or '', head.session,
          run.triggers, redis.call('HGET', rec, 'key'), head.scope, run.received and '1' or '0', run.labels or '',
          run.outcome, run.why or ''}
end

-- unstarted -> cleared: no slot, not to run, its callers to be told by whoever comes at `at`. The timer stands before
-- the run leaves the queue, so that they are told whoever dies. The caller writes the run, and advances the key.
local function take_out(head, run, outcome, why, at)
  release(head, run, false)
  close(head, run)
  run.state, run.token, run.outcome, run.why = 'cleared', mint(), outcome, why
  set_timer(run, at)
end
