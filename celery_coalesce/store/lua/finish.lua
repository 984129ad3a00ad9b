-- Ends a run, once its followers have been told, and passes its slots on.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting, held,
--   drains, history
-- ARGV: asked (JSON: state, run, token, told, redispatch, soon, announce_in (ms) and, of a run that had begun: outcome,
--   error, rests (whether it has done anything), once (ms, -1 for ever), cooldown, rest (ms, the longest cooldown of
--   the scope)), drain (what the drain is announced with)
-- Returns: followers, follower ...; or ended, 1 if drained, and what is to be sent; or lost
-- Transition: running | cleared -> (none); pending -> dispatched; last run -> drained
-- Order: what is kept, and the drain, are put aside before the record goes; the holder's index goes last: until then
--   the run is found.
--# include record
--# include slots
--# include note

local SLICE = 100

local function field(run, number)
  return 'fol:' .. acceptance(run) .. ':' .. number
end

local function finish()
  local head = read_head()
  local run = head and read_run(asked.run)
  if not run then
    -- Should the record have been lost, nobody else takes the lease out.
    redis.call('SREM', KEYS[10], asked.state .. '/' .. asked.run)
    local again = sent_by(head, asked.token)
    return again and {'ended', '0', unpack(again)} or {'lost'}
  end
  if run.token ~= asked.token then return {'lost'} end
  while run.told < asked.told do
    run.told = run.told + 1
    redis.call('HDEL', rec, field(run, run.told))
  end
  if run.followers > run.told then
    local slice = {'followers'}
    for number = run.told + 1, math.min(run.followers, run.told + SLICE) do
      slice[#slice + 1] = redis.call('HGET', rec, field(run, number))
    end
    run.returned = true
    write_run(run)
    return slice
  end
  if asked.once then
    local till = asked.once > 0 and now + asked.once or nil
    outliving().keep('once:' .. run.task, {run = run.id, task_id = run.task_id, till = till})
  end
  if asked.rest then outliving().rest_from_now(asked.cooldown, asked.rest) end
  if asked.outcome then note(KEYS[12], run) end
  local drained = forget(head, run, asked.rests)
  if drained then
    if asked.announce_in then redis.call('ZADD', KEYS[11], now + asked.announce_in, ARGV[2]) end
  else
    note_sent(head, asked.token)
  end
  redis.call('SREM', KEYS[10], ref(run))
  return {'ended', drained and '1' or '0', unpack(sent)}
end

return flush(finish())
