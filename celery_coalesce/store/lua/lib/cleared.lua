-- What is needed to tell the callers of a cleared run.
local function cleared_run(head, run)
  return {run.token, run.task_id, run.task, redis.call('HGET', rec, 'call:' .. run.id) or '', head.session,
          run.triggers, redis.call('HGET', rec, 'key'), head.scope, run.received and '1' or '0', run.why or ''}
end
