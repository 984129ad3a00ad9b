-- Moves on a run whose timer is over.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting
-- ARGV: asked (JSON: state, nonce, run, redispatch, soon, lease)
-- Returns: dispatched, what is to be sent, reason (due, lost, unpublished); cleared, and what tells its callers; stop,
--   process and task id and run of each that is to stop, what is to be sent; or early, gone
-- Transition: pending and due -> dispatched | waiting; dispatched, retrying -> the same, published again; dispatched
--   and held by nobody -> (none), or cleared where others joined; cleared -> told by another
-- Order: the timer is moved in the same write as the state, so that two sweeps never wake one run.
--# include record
--# include slots
--# include cleared
--# include stopping

-- Its message was lost, or is known not to have been published, or never was.
local function again(head, run)
  local reason
  if run.unsent or run.unpublished then
    reason = run.unpublished and 'unpublished' or 'due'
    set_timer(run, now + asked.redispatch)
  else
    reason = 'lost'
    run.losses = run.losses + 1
    set_timer(run, lost_at(run))
  end
  run.unsent, run.unpublished, run.message_at = nil, nil, now
  write_run(run)
  send(envelope(run))
  note_sent(head, asked.nonce)
  return {'dispatched', sent, reason}
end

-- A waiting run comes to the front, or stays where it is.
local function look(head, run)
  wait_in_turn(run)
  if run.message_at then run.losses = run.losses + 1 end
  run.message_at, run.unsent, run.unpublished = nil, nil, nil
  clear_timer(run)
  write_run(run)
  if stops_at(head, run) and run.stop_at <= now and not fits(head, run.limit) then
    return stop(head, run)
  end
  advance(head)
  note_sent(head, asked.nonce)
  return {'dispatched', sent, 'due'}
end

local function wake()
  local at = redis.call('ZSCORE', timers, asked.state .. '/' .. asked.run)
  local head = read_head()
  local run = head and read_run(asked.run)
  if not at or tonumber(at) > now then
    if sent_by(head, asked.nonce) then return {'dispatched', sent, 'due'} end
    return {'early'}
  end
  if not run or run.state == 'running' then
    redis.call('ZREM', timers, asked.state .. '/' .. asked.run)
    return {'gone'}
  end
  if run.state == 'cleared' then
    if sent_by(head, asked.nonce) then return {'dispatched', sent, 'due'} end
    run.token = mint()
    set_timer(run, now + asked.lease)
    write_run(run)
    return {'cleared', cleared_run(head, run)}
  end
  if run.state == 'pending' then
    if run.due <= now then return look(head, run) end
    -- It was put off.
    run.message_at = nil
    local delay = schedule(run, run.due)
    if delay >= 0 then send(envelope(run, delay)) end
    write_run(run)
    note_sent(head, asked.nonce)
    return {'dispatched', sent, 'due'}
  end
  if run.patience and run.state == 'dispatched' then
    -- Whoever waited for it would have come by now. Those who joined it are told.
    if run.followers > 0 then
      take_out(head, run, 'lost', 'its caller was not heard of', now)
      write_run(run)
      advance(head)
      note_sent(head, asked.nonce)
    elseif not forget(head, run, false) then
      note_sent(head, asked.nonce)
    end
    return {'dispatched', sent, 'due'}
  end
  return again(head, run)
end

return flush(wake())
