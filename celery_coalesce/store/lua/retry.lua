-- Keeps the run for its next attempt, or for the task of the same key that replaces it.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting, held
-- ARGV: asked (JSON: state, run, token, task, redispatch, soon, on_retry and delay or due), args,
--   call
-- Returns: retrying, what is to be sent; or lost
-- Transition: running -> retrying (hold, merge: it keeps its slots; merge: triggers may join it); running -> pending
--   (release); running -> cleared (a newer trigger replaces it)
-- Order: the timer before the holder's index goes, so that one of the two always finds the run.
--# include record
--# include slots
--# include cleared

local function superseded(head, run)
  local open = head.open[run.task]
  local newest = open and read_run(open[#open])
  return newest and newest.mode == 'replace'
end

local function retry()
  local head = read_head()
  local run = head and read_run(asked.run)
  if not run or run.state ~= 'running' or run.token ~= asked.token then
    if run and run.retried == asked.token and run.state ~= 'running' then
      return {'retrying', sent_by(head, asked.token) or {}}
    end
    return {'lost'}
  end
  if superseded(head, run) then
    -- A newer trigger is to replace it: it does not come again, and its callers are told.
    take_out(head, run, 'stopped', 'superseded', now)
    run.retried = asked.token
    write_run(run)
    advance(head)
    note_sent(head, asked.token)
    redis.call('SREM', KEYS[10], ref(run))
    return {'retrying', sent}
  end
  run.due = asked.delay and now + asked.delay or asked.due or now
  run.task, run.attempt, run.retried, run.version = asked.task, run.attempt + 1, asked.token, run.version + 1
  run.token, run.owner, run.claim, run.unsent, run.message_at, run.returned = nil, nil, nil, nil, nil, nil
  set('args:' .. run.id, ARGV[2])
  if ARGV[3] ~= '' then
    set('call:' .. run.id, ARGV[3])
  else
    redis.call('HDEL', rec, 'call:' .. run.id)
  end
  -- What the run's own mode has no use for is left aside, as all that a task declares and one call does not.
  if asked.on_retry == 'release' and (run.mode == 'queue' or run.mode == 'serialize') then
    run.state = 'pending'
    release(head, run, false)
  else
    run.state = 'retrying'
    if asked.on_retry == 'merge' and run.mode == 'queue' then
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
  redis.call('SREM', KEYS[10], ref(run))
  return {'retrying', sent}
end

return flush(retry())
