-- The record of one key, as every transition reads and writes it.
--
-- Scripts that include this take, as their first ten KEYS, those below, and as ARGV[1] a JSON object with at least
-- `state` (the state id, which names the key in the indexes).

--# include server

local VERSION = 2
local HOUR = 3600000

local rec, wait, meta, timers, kept = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local busy = KEYS[6]
local asked = cjson.decode(ARGV[1])

-- Whole numbers as Redis wants them: Lua's tostring would round from the 15th digit on.
local function whole(number)
  return string.format('%.0f', number)
end

local function micros()
  local time = redis.call('TIME')
  return time[1] * 1000000 + time[2]
end

-- Milliseconds on the server's clock.
local now = math.floor(micros() / 1000)

-- The next number of the namespace: run ids, session ids and fencing tokens. Never behind the clock, so that numbers
-- grow even over a loss of the store, or of a part of it.
local last
local function mint()
  local clock = micros()
  last = last or last_number(meta, clock)
  last = math.max(clock, last + 1)
  redis.call('HSET', meta, 'last', whole(last))
  return whole(last)
end

local function write_head(head)
  redis.call('HSET', rec, 'head', cmsgpack.pack(head))
end

-- What version 1 wrote. It had no index of busy keys, and noted otherwise what a call had left to others; what of a run
-- it did not know has a default wherever it is read. From here on version 1 refuses the record.
local function converted(head)
  head.v, head.ended = VERSION, nil
  redis.call('ZADD', busy, head.session, asked.state)
  write_head(head)
  return head
end

local function read_head()
  local packed = redis.call('HGET', rec, 'head')
  if not packed then return nil end
  local head = cmsgpack.unpack(packed)
  if head.v > VERSION then
    error({err = 'NEWER this record was written by a newer celery-coalesce (version ' .. head.v .. ')'})
  end
  return head.v < VERSION and converted(head) or head
end

local function read_run(run_id)
  local packed = redis.call('HGET', rec, 'run:' .. run_id)
  return packed and cmsgpack.unpack(packed) or nil
end

local function write_run(run)
  redis.call('HSET', rec, 'run:' .. run.id, cmsgpack.pack(run))
end

local function ref(run)
  return asked.state .. '/' .. run.id
end

local function set_timer(run, at)
  redis.call('ZADD', timers, whole(at), ref(run))
end

local function has_timer(run)
  return redis.call('ZSCORE', timers, ref(run)) ~= false
end

local function clear_timer(run)
  redis.call('ZREM', timers, ref(run))
end

-- When somebody looks whether a message was lost. The first loss is noticed soon; from the second on it is more likely
-- a slow queue than a lossy one.
local function lost_at(run)
  return now + (run.losses > 0 and math.max(HOUR, asked.redispatch) or asked.redispatch)
end

-- When a run that may not start before a time is woken: soon, by a message that a worker holds; later, by the sweep
-- alone. A message that is under way and comes no later will do. Returns how long a new message waits, in
-- milliseconds, -1 for none.
local function schedule(run, at)
  if at - now > asked.soon then
    run.unsent, run.message_at = true, nil
    set_timer(run, at)
    return -1
  end
  set_timer(run, at + asked.redispatch)
  if run.message_at and run.message_at <= at then return -1 end
  run.unsent, run.message_at = nil, at
  return math.max(at - now, 0)
end

-- What a message for this run is made from.
local function envelope(run, delay)
  local blobs = redis.call('HMGET', rec, 'args:' .. run.id, 'call:' .. run.id)
  return {run.id, run.task_id, run.task, run.attempt, run.version, delay or 0, blobs[1] or '', blobs[2] or ''}
end

-- What outlives an idle key because it was asked for, and for no longer than that: values have a `till`, in ms, or are
-- kept for ever.
local function expire_kept()
  local fields, longest = redis.call('HGETALL', kept), 0
  for position = 2, #fields, 2 do
    local till = cmsgpack.unpack(fields[position]).till
    if not till then
      redis.call('PERSIST', kept)
      return
    end
    longest = math.max(longest, till)
  end
  redis.call('PEXPIREAT', kept, whole(longest))
end

local function keep(field, value)
  redis.call('HSET', kept, field, cmsgpack.pack(value))
  expire_kept()
end

-- A run has ended: the key rests for its cooldown, and for what is left of an earlier one; kept for as long as any task
-- of the scope could ask.
local function rest_from_now(cooldown, longest)
  local packed = redis.call('HGET', kept, 'rest')
  local before = packed and cmsgpack.unpack(packed) or {from = 0, cooldown = 0, till = 0}
  local left = math.max(before.from + before.cooldown - now, cooldown)
  keep('rest', {from = now, cooldown = left, till = math.max(now + longest, before.till)})
end

-- The tick that a run was made for has none: another beat's may have it.
local function forget_ticks(run)
  local fields = redis.call('HGETALL', kept)
  for position = 1, #fields, 2 do
    local ours = cmsgpack.unpack(fields[position + 1]).run == run.id
    if ours and fields[position]:sub(1, 5) == 'tick:' then redis.call('HDEL', kept, fields[position]) end
  end
  if #fields > 0 and redis.call('EXISTS', kept) == 1 then expire_kept() end
end

-- The success after which further triggers of a task need no run.
local function done_once(task)
  local packed = redis.call('HGET', kept, 'once:' .. task)
  local done = packed and cmsgpack.unpack(packed)
  return done and (not done.till or done.till > now) and done or nil
end

-- A run that triggers may no longer join.
local function close(head, run)
  local open = head.open[run.task]
  if open then
    for position, run_id in ipairs(open) do
      if run_id == run.id then table.remove(open, position) break end
    end
    if #open == 0 then head.open[run.task] = nil end
  end
  if head.lone[run.task] == run.id then head.lone[run.task] = nil end
end
