-- The record of one key, as every transition reads and writes it.
--
-- Scripts that include this take, as their first nine KEYS, those below, and as ARGV[1] a JSON object with at least
-- `state` (the state id, which names the key in the indexes).

--# include server

local VERSION = 4
local HOUR = 3600000

local rec, wait, meta, timers, kept = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local asked = cjson.decode(ARGV[1])

-- Whole numbers as Redis wants them, but for scores: Lua's tostring would round from the 15th digit on.
local function whole(number)
  return string.format('%.0f', number)
end

-- The server's clock as the script begins, in microseconds and in milliseconds.
local time = redis.call('TIME')
local clock = time[1] * 1000000 + time[2]
local now = math.floor(clock / 1000)

-- The next number of the namespace: run ids, session ids and fencing tokens. Never behind the clock, so that numbers
-- grow even over a loss of the store, or of a part of it.
local last, minted = nil, nil
local function mint()
  last = math.max(clock, (last or last_number(meta, clock)) + 1)
  minted = whole(last)
  return minted
end

-- The record is read once and written once: scripts change what is here, and `flush` it at their end.
local head_read, head_changed, runs_read, runs_changed, others_changed = nil, false, {}, {}, {}

local function set(field, value)
  others_changed[field] = value
end

local function get(field)
  return others_changed[field] or redis.call('HGET', rec, field)
end

local function write_head(head)
  head_read, head_changed = head, true
end

local function write_run(run)
  runs_read[run.id], runs_changed[run.id] = run, run
end

-- Writes what has changed. Given the script's answer, returns it.
local function flush(answer)
  if minted then redis.call('HSET', meta, 'last', minted) end
  if head_changed then others_changed.head = cmsgpack.pack(head_read) end
  for run_id, run in pairs(runs_changed) do
    -- The field's name says it.
    run.id = nil
    others_changed['run:' .. run_id] = cmsgpack.pack(run)
    run.id = run_id
  end
  local changed, count = {}, 0
  for field, value in pairs(others_changed) do
    changed[count + 1], changed[count + 2] = field, value
    count = count + 2
  end
  if count > 0 then redis.call('HSET', rec, unpack(changed, 1, count)) end
  minted, head_changed, runs_changed, others_changed = nil, false, {}, {}
  return answer
end

local function erase_run(run)
  runs_read[run.id], runs_changed[run.id] = nil, nil
  local gone = {'run:' .. run.id, 'args:' .. run.id, 'call:' .. run.id}
  if run.message then gone[4] = 'msg:' .. run.message end
  for _, field in ipairs(gone) do others_changed[field] = nil end
  redis.call('HDEL', rec, unpack(gone))
end

local function erase_record()
  head_changed, runs_changed, others_changed = false, {}, {}
  redis.call('DEL', rec, wait)
end

-- What an older version wrote. Version 1 noted otherwise what a call had left to others; what of a run it did not know
-- has a default wherever it is read, and so has what version 2 wrote and later ones leave out. From here on older ones
-- refuse the record.
local function converted(head)
  if head.v == 1 then head.ended = nil end
  if head.v < 4 then head.key, head.recent, head.batches = redis.call('HGET', rec, 'key'), nil, nil end
  head.v = VERSION
  redis.call('HSET', rec, 'head', cmsgpack.pack(head))
  return head
end

local function read_head()
  if head_read then return head_read end
  local packed = redis.call('HGET', rec, 'head')
  if not packed then return nil end
  local head = cmsgpack.unpack(packed)
  if head.v > VERSION then
    error({err = 'NEWER this record was written by a newer celery-coalesce (version ' .. head.v .. ')'})
  end
  head_read = head.v < VERSION and converted(head) or head
  return head_read
end

-- What is not written of a run, because it is so with nearly all.
local USUAL = {__index = {mode = 'queue', limit = 1, triggers = 1, attempt = 0, version = 0, followers = 0, told = 0,
                          losses = 0}}

local function unpacked(run_id, packed)
  local run = setmetatable(cmsgpack.unpack(packed), USUAL)
  run.id = run_id
  return run
end

local function read_run(run_id)
  if runs_read[run_id] then return runs_read[run_id] end
  local packed = redis.call('HGET', rec, 'run:' .. run_id)
  local run = packed and unpacked(run_id, packed) or nil
  runs_read[run_id] = run
  return run
end

-- What tells its place among others: the number of the trigger that made it, or of the run whose triggers it took over.
local function acceptance(run)
  return run.seq or run.id
end

local function ref(run)
  return asked.state .. '/' .. run.id
end

local function set_timer(run, at)
  redis.call('ZADD', timers, at, ref(run))
end

local function has_timer(run_id)
  return redis.call('ZSCORE', timers, asked.state .. '/' .. run_id) ~= false
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
  flush()
  local blobs = redis.call('HMGET', rec, 'args:' .. run.id, 'call:' .. run.id)
  return {run.id, run.task_id, run.task, run.attempt, run.version, delay or 0, blobs[1] or '', blobs[2] or ''}
end

-- What outlives an idle key because it was asked for. To make a function takes the server time, called or not, so those
-- that most calls do without are made by the first that needs one.
local keeping
local function outliving()
  keeping = keeping or (function()
    --# include kept
  end)()
  return keeping
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
  if head.lone and head.lone[run.task] == run.id then head.lone[run.task] = nil end
end
