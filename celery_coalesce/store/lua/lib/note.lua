-- What is remembered of a task: how many runs have ended, how many of them failed, and the last of each.

local function note(history, run)
  redis.call('HINCRBY', history, 'runs:' .. run.task, 1)
  local last = {run = run.id, task_id = run.task_id, at = now, outcome = asked.outcome}
  redis.call('HSET', history, 'last:' .. run.task, cmsgpack.pack(last))
  if asked.error then
    redis.call('HINCRBY', history, 'errors:' .. run.task, 1)
    redis.call('HSET', history, 'error:' .. run.task, asked.error)
  elseif asked.outcome == 'succeeded' then
    redis.call('HDEL', history, 'error:' .. run.task)
  end
end
