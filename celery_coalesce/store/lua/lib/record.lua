-- The record of one key, as every transition reads and writes it.
--
-- Scripts that include this take, as their first four KEYS, the record, its waiting runs, the namespace's numbers
-- and its
-- timers, and as ARGV[1] a JSON object with at least `state` (the state id, which names the key in the timers).

local VERSION = 1

local rec, wait, meta, timers = KEYS[1], KEYS[2], KEYS[3], KEYS[4]
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

-- The server's own run id, which changes when it restarts or another takes over. '' where INFO is not allowed.
local function server_id()
  local info = redis.pcall('INFO', 'server')
  return type(info) == 'string' and info:match('run_id:(%w+)') or ''
end

-- The next number of the namespace: run ids, session ids and fencing tokens. Never behind the clock, so that
-- numbers grow
-- even over a loss of the store, or of a part of it.
local function mint()
  local last = redis.call('HGET', meta, 'last')
  local number = micros()
  if last then
    number = math.max(number, tonumber(last) + 1)
  else
    redis.call('HSET', meta, 'since', whole(number), 'server', server_id())
  end
  redis.call('HSET', meta, 'last', whole(number))
  return whole(number)
end

local function read_head()
  local packed = redis.call('HGET', rec, 'head')
  if not packed then return nil end
  local head = cmsgpack.unpack(packed)
  if head.v > VERSION then
    error({err = 'NEWER this record was written by a newer celery-coalesce (version ' .. head.v .. ')'})
  end
  return head
end

local function write_head(head)
  redis.call('HSET', rec, 'head', cmsgpack.pack(head))
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

local function clear_timer(run)
  redis.call('ZREM', timers, ref(run))
end

-- May a run take a slot now, beside those that are reserved? Only within the least limit of all concerned.
local function fits(head, limit, reserved)
  local taken = reserved or 0
  for _, other in pairs(head.active) do
    taken = taken + 1
    if other < limit then limit = other end
  end
  return taken < limit
end

local function none_waiting()
  return redis.call('EXISTS', wait) == 0
end

-- pending -> dispatched. The caller writes head and run, and somebody publishes the envelope.
local function dispatch(head, run)
  run.state = 'dispatched'
  head.active[run.id] = run.limit
  set_timer(run, now + asked.redispatch)
end

-- When a run that is not due yet is woken: soon, by a message that a worker holds; later, by the sweep alone.
-- Returns how long the message waits in milliseconds, -1 for no message.
local function schedule(run)
  local delay = run.due - now
  if delay <= asked.soon then
    set_timer(run, run.due + asked.redispatch)
    return math.max(delay, 0)
  end
  run.unsent = true
  set_timer(run, run.due)
  return -1
end

-- What a message for this run is made from.
local function envelope(run, delay)
  local blobs = redis.call('HMGET', rec, 'args:' .. run.id, 'call:' .. run.id)
  return {run.id, run.task_id, run.task, run.attempt, run.version, delay or 0, blobs[1] or '', blobs[2] or ''}
end

-- What the call with this nonce dispatched when a run ended, should the call be repeated because its reply was lost.
local function dispatched_by(head, nonce)
  if not (head and head.ended and head.ended.nonce == nonce) then return nil end
  local sent = {}
  for _, run_id in ipairs(head.ended.sent) do
    local run = read_run(run_id)
    if run and run.state == 'dispatched' then sent[#sent + 1] = envelope(run) end
  end
  return sent
end

local function note_dispatched(head, nonce, sent)
  head.ended = {nonce = nonce, sent = {}}
  for position, letter in ipairs(sent) do head.ended.sent[position] = letter[1] end
  write_head(head)
end

-- Waiting runs into free slots, the oldest first: one that does not fit holds back those behind it.
local function promote(head)
  local sent = {}
  while true do
    local first = redis.call('ZRANGE', wait, 0, 0)[1]
    if not first then break end
    local run = read_run(first)
    if run and not fits(head, run.limit) then break end
    redis.call('ZREM', wait, first)
    if run then
      dispatch(head, run)
      write_run(run)
      sent[#sent + 1] = envelope(run)
    end
  end
  return sent
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

-- Any state -> (gone). What is left of the session is written, or nothing at all.
-- Returns whether the session has drained, and the envelopes of what was dispatched into the slot.
local function forget(head, run)
  close(head, run)
  clear_timer(run)
  redis.call('ZREM', wait, run.id)
  redis.call('HDEL', rec, 'run:' .. run.id, 'args:' .. run.id, 'call:' .. run.id)
  if run.message then redis.call('HDEL', rec, 'msg:' .. run.message) end
  head.active[run.id] = nil
  head.runs = head.runs - 1
  if head.runs == 0 then
    redis.call('DEL', rec, wait)
    return true, {}
  end
  local sent = promote(head)
  write_head(head)
  return false, sent
end
