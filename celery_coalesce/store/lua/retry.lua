-- Keeps the run for its next attempt, or for the task of the same key that replaces it.
--
-- KEYS: record, waiting, meta, timers, kept, busy, limits, slots, lines, resting, held
-- ARGV: asked (JSON: state, run, token, task, redispatch, soon, on_retry and delay or due), args, call
-- Returns: retrying, what is to be sent; or lost
-- Transition: running -> retrying (hold, merge: it keeps its slots; merge: triggers may join it); running -> pending
--   (release)
-- Order: the timer before the holder's index goes, so that one of the two always finds the run.
--# include record
--# include slots

local function retry()
  local head = read_head()
  local run = head and read_run(asked.run)
  if not run or run.state ~= 'running' or run.token ~= asked.token then
    if run and run.retried == asked.token then return {'retrying', sent_by(head, asked.token) or {}} end
    return {'lost'}
  end
  run.due = asked.delay and now + asked.delay or asked.due or now
  run.task, run.attempt, run.retried, run.version = asked.task, run.attempt + 1, run.token, run.version + 1
  run.token, run.owner, run.claim, run.unsent, run.message_at = nil, nil, nil, nil, nil
  redis.call('HSET', rec, 'args:' .. run.id, ARGV[2])
  if ARGV[3] ~= '' then
    redis.call('HSET', rec, 'call:' .. run.id, ARGV[3])
  else
    redis.call('HDEL', rec, 'call:' .. run.id)
  end
  if asked.on_retry == 'release' then
    run.state = 'pending'
    release(head, run, true)
  else
    run.state = 'retrying'
    if asked.on_retry == 'merge' then
      local open = head.open[run.task] or {}
      table.insert(open, 1, run.id)
      head.open[run.task] = open
    end
  end
  if run.state == 'pending' and run.due <= now then
    wait_in_turn(run)
  else
    local delay = schedule(run, run.due)
    if delay >= 0 then send(envelope(run, delay)) end
  end
  write_run(run)
  if run.state == 'pending' then advance(head) end
  note_sent(head, asked.token)
  redis.call('SREM', KEYS[11], ref(run))
  return {'retrying', sent}
end

return retry()
