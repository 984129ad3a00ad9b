-- Takes a lease from a process whose presence ran out.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting, presence,
--   held of the dead, held of the sweeper
-- ARGV: asked (JSON: state, nonce, run, owner, sweeper, lease, redispatch)
-- Returns: dispatched, envelopes to publish, and the lost lease's: token, session, index, attempt, triggers, key,
--   scope, task id, task, labels; or lost, new token, and the same, call; or alive, grace, gone
-- Transition: running (late ack) -> dispatched; running -> running under the sweeper, which ends it
-- Order: the new holder's index before the old one's goes.
--# include record

local function lost_lease(head, run)
  return run.token, head.session, run.index, run.attempt, run.triggers, head.key, head.scope,
         run.task_id, run.task, run.labels or ''
end

local function lost_to_sweeper(head, run)
  local lost = {lost_lease(head, run)}
  lost[#lost + 1] = redis.call('HGET', rec, 'call:' .. run.id) or ''
  return lost
end

local function lose()
  local head = read_head()
  local run = head and read_run(asked.run)
  if run and run.lost_of == asked.owner .. asked.nonce then
    -- The same call again: its reply was lost, and nobody else will end what it took; not even if its holder has come
    -- back meanwhile.
    if run.state == 'dispatched' then return {'dispatched', {envelope(run)}, unpack(run.lost)} end
    if run.owner == asked.sweeper then return {'lost', {}, unpack(lost_to_sweeper(head, run))} end
  end
  local expiry = redis.call('ZSCORE', KEYS[10], asked.owner)
  if expiry and tonumber(expiry) > now then return {'alive'} end
  if tonumber(redis.call('HGET', meta, 'grace') or '0') > now then return {'grace'} end
  if not run or run.state ~= 'running' or run.owner ~= asked.owner then
    redis.call('SREM', KEYS[11], asked.state .. '/' .. asked.run)
    return {'gone'}
  end
  if run.late and not run.ending then
    local lost = {lost_lease(head, run)}
    run.state, run.token, run.owner, run.claim, run.losses, run.again = 'dispatched', nil, nil, nil, 0, true
    run.returned = nil
    run.lost_of, run.lost = asked.owner .. asked.nonce, lost
    set_timer(run, now + asked.redispatch)
    write_run(run)
    redis.call('SREM', KEYS[11], ref(run))
    return {'dispatched', {envelope(run)}, unpack(lost)}
  end
  run.owner, run.token, run.claim, run.returned = asked.sweeper, mint(), nil, true
  run.lost_of = asked.owner .. asked.nonce
  redis.call('SADD', KEYS[12], ref(run))
  redis.call('ZADD', KEYS[10], now + asked.lease, asked.sweeper)
  write_run(run)
  redis.call('SREM', KEYS[11], ref(run))
  return {'lost', {}, unpack(lost_to_sweeper(head, run))}
end

return flush(lose())
