-- Gives a run its lease, or says why not.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting, presence, held
-- ARGV: asked (JSON: state, nonce, run, task_id, task, attempt, version, claim, owner, late, lease, revoked,
--   redispatch, soon)
-- Returns: running | expired | revoked | skipped, JSON of the lease (token, session, index, triggers, store, expires in
--   ms, key, scope, mode (skip if its task is ever called so), labels) and, if there is any of it, changed args, task
--   id of the run that was done once, what is to be sent; early, ms, what is to be sent; pending, what is to be sent;
--   carry, call; stop, process and task id and run of each that is to stop, what is to be sent; or duplicate, gone,
--   unknown
-- Transition: dispatched | retrying | pending and due -> running
-- Order: the holder's index before the run, so that a running run is always found from its dead holder; the message
--   last, when the run is written.
--# include record
--# include slots
--# include cleared
--# include stopping

local function leased(head, run)
  local mode = redis.call('HEXISTS', meta, 'skips:' .. run.task) == 1 and 'skip' or run.mode
  -- An older message may have come first: its arguments are not those that were merged since.
  local changed = run.version ~= asked.version and redis.call('HGET', rec, 'args:' .. run.id) or ''
  local done = run.ending == 'skipped' and outliving().done_once(run.task)
  local lease = cjson.encode({token = run.token, session = head.session, index = run.index, triggers = run.triggers,
                              store = run.store, expires = run.expires, key = head.key,
                              scope = head.scope, mode = mode, labels = run.labels})
  local answer = {run.ending or 'running', lease}
  if changed ~= '' or done or #sent > 0 then
    answer[3], answer[4], answer[5] = changed, done and done.task_id or '', sent
  end
  return answer
end

-- Not now. A message whose time is near is kept by its worker; another is of no use.
local function not_before(run, at)
  local soon = at - now <= asked.soon
  run.message_at = soon and at or nil
  schedule(run, at)
  write_run(run)
  return soon and {'early', math.max(at - now, 0), sent} or {'pending', sent}
end

local function start()
  local head = read_head()
  local run = head and read_run(asked.run)
  if not run then return {may_be_lost(meta, tonumber(asked.run), clock) and 'unknown' or 'gone'} end
  if run.task_id ~= asked.task_id or run.task ~= asked.task then return {'unknown'} end
  if run.state == 'cleared' then return {'gone'} end
  if run.state == 'running' then
    if run.claim == asked.claim then
      sent_by(head, asked.claim)
      return leased(head, run)
    end
    return {'duplicate'}
  end
  if run.attempt ~= asked.attempt then return {'duplicate'} end
  if sent_by(head, asked.nonce) then return {'pending', sent} end
  if run.due > now then return not_before(run, run.due) end
  if asked.revoked and (run.triggers > 1 or run.joined) and not run.index then
    return {'carry', redis.call('HGET', rec, 'call:' .. run.id) or ''}
  end
  if run.state == 'dispatched' and not run.index and rests_until(run) > now then
    -- It rests first, in its turn: another message comes for it then.
    release(head, run, false)
    run.state = 'pending'
    wait_in_turn(run)
    write_run(run)
    advance(head)
    note_sent(head, asked.nonce)
    return {'pending', sent}
  end
  if run.state == 'pending' then
    run.message_at = nil
    local answer = try_to_start(head, run)
    if answer ~= true then
      wait_in_turn(run)
      local asked_again = run.stopped == asked.nonce
      if answer and answer > now and not asked_again then return not_before(run, answer) end
      if answer then return stop(head, run) end
      clear_timer(run)
      write_run(run)
      return {'pending', sent}
    end
    redis.call('ZREM', wait, run.id)
  end
  redis.call('SADD', KEYS[11], ref(run))
  redis.call('ZADD', KEYS[10], now + asked.lease, asked.owner)
  clear_timer(run)
  close(head, run)
  if not run.index then
    run.index = head.index
    head.index = head.index + 1
  end
  run.ending = asked.revoked and 'revoked' or (run.expires and run.expires <= now and 'expired')
    or (run.once and outliving().done_once(run.task) and 'skipped') or nil
  run.state, run.token, run.owner, run.claim, run.late = 'running', mint(), asked.owner, asked.claim, asked.late
  run.returned, run.unpublished, run.losses, run.message_at, run.unsent = nil, nil, 0, nil, nil
  write_run(run)
  advance(head)
  if #sent > 0 then note_sent(head, asked.claim) else write_head(head) end
  return leased(head, run)
end

return flush(start())
