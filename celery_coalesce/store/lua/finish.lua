-- Ends a run, once its followers have been told, and passes its slot on.
--
-- KEYS: record, waiting, meta, timers, held, drains
-- ARGV: asked (JSON: state, run, token, told, redispatch, announce_in (ms)), drain (what the drain is announced with)
-- Returns: followers, follower ...; or ended, 1 if drained, envelopes to publish; or lost
-- Transition: running | cleared -> (none); pending -> dispatched; last run -> drained
-- Order: the drain is put aside before the record goes, the holder's index goes last: until then the run is found.
--# include record

local SLICE = 100

local function field(run, number)
  return 'fol:' .. run.box .. ':' .. number
end

local function finish()
  local head = read_head()
  local run = head and read_run(asked.run)
  if not run then
    local again = dispatched_by(head, asked.token)
    return again and {'ended', '0', again} or {'lost'}
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
  local drained, sent = forget(head, run)
  if drained then
    if asked.announce_in then redis.call('ZADD', KEYS[6], whole(now + asked.announce_in), ARGV[2]) end
  else
    note_dispatched(head, asked.token, sent)
  end
  redis.call('SREM', KEYS[5], ref(run))
  return {'ended', drained and '1' or '0', sent}
end

return finish()
