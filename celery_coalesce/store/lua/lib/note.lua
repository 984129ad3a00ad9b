-- What is remembered of a task: how many runs have ended, how many of them failed, and the last of each.

local function note(history, run)
  local last = cmsgpack.pack({run = run.id, task_id = run.task_id, at = now, outcome = asked.outcome})
  redis.call('HINCRBY', history, 'runs:' .. run.task, 1)
  if asked.error then redis.call('HINCRBY', history, 'errors:' .. run.task, 1) end
  if asked.error or asked.outcome == 'succeeded' then
    redis.call('HSET', history, 'last:' .. run.task, last, 'error:' .. run.task, asked.error or '')
  else
    redis.call('HSET', history, 'last:' .. run.task, last)
  end
end
