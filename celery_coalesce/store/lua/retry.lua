-- Keeps the slot for the run's next attempt, or for the task of the same key that replaces it.
--
-- KEYS: record, waiting, meta, timers, held
-- ARGV: asked (JSON: state, run, token, task, redispatch, soon and delay or due), args, call
-- Returns: retrying, envelopes to publish; or lost
-- Transition: running -> retrying
-- Order: the timer before the holder's index goes, so that one of the two always finds the run.
--# include record
local head = read_head()
local run = head and read_run(asked.run)
if not run or run.state ~= 'running' or run.token ~= asked.token then
  if run and run.state == 'retrying' and run.retried == asked.token then
    return {'retrying', run.unsent and {} or {envelope(run, math.max(run.due - now, 0))}}
  end
  return {'lost'}
end
run.due = asked.delay and now + asked.delay or asked.due or now
run.state, run.task, run.attempt, run.retried = 'retrying', asked.task, run.attempt + 1, run.token
run.token, run.owner, run.claim, run.unsent = nil, nil, nil, nil
run.version = run.version + 1
redis.call('HSET', rec, 'args:' .. run.id, ARGV[2])
if ARGV[3] ~= '' then
  redis.call('HSET', rec, 'call:' .. run.id, ARGV[3])
else
  redis.call('HDEL', rec, 'call:' .. run.id)
end
local delay = schedule(run)
write_run(run)
redis.call('SREM', KEYS[5], ref(run))
return {'retrying', delay >= 0 and {envelope(run, delay)} or {}}
