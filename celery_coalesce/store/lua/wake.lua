-- Moves on a run whose timer is over.
--
-- KEYS: record, waiting, meta, timers
-- ARGV: asked (JSON: state, nonce, run, redispatch, hourly, lease)
-- Returns: dispatched, envelopes to publish, reason (due, lost, unpublished); cleared, token, task id, task, call,
--   session, triggers, key, scope, 1 if received, why; or pending, early, gone
-- Transition: pending and due -> dispatched | waiting; dispatched, retrying -> the same, published again; cleared
--   -> told by another
-- Order: the timer is moved in the same write as the state, so that two sweeps never wake one run.
--# include record
--# include cleared

local function wake()
  local at = redis.call('ZSCORE', timers, asked.state .. '/' .. asked.run)
  local head = read_head()
  local run = head and read_run(asked.run)
  if not at or tonumber(at) > now then
    if run and run.woken == asked.nonce then return {'dispatched', {envelope(run)}, 'due'} end
    return {'early'}
  end
  if not run or run.state == 'running' then
    redis.call('ZREM', timers, asked.state .. '/' .. asked.run)
    return {'gone'}
  end
  if run.state == 'cleared' then
    run.token = mint()
    set_timer(run, now + asked.lease)
    write_run(run)
    return {'cleared', unpack(cleared_run(head, run))}
  end
  local reason = 'due'
  if run.state == 'pending' then
    if not (none_waiting() and fits(head, run.limit)) then
      clear_timer(run)
      redis.call('ZADD', wait, run.seq, run.id)
      return {'pending'}
    end
    dispatch(head, run)
    write_head(head)
  elseif run.unsent or run.unpublished then
    reason = run.unpublished and 'unpublished' or 'due'
    set_timer(run, now + asked.redispatch)
  else
    -- The first loss is noticed soon; from the second on it is more likely a slow queue than a lossy one.
    reason = 'lost'
    run.losses = run.losses + 1
    set_timer(run, now + math.max(asked.hourly, asked.redispatch))
  end
  run.unsent, run.unpublished, run.woken = nil, nil, asked.nonce
  write_run(run)
  return {'dispatched', {envelope(run)}, reason}
end

return wake()
