-- Who may start: the key's slots, its rest between runs, and the constraints that runs of any key share.
--
-- Needs lib/record. Nothing is held while a run waits, and whoever waits is passed by nobody who came later: so
-- every waiting run is at some time the oldest of all, and then nothing but running ones and clocks stand in its way.

local limits, slots, lines, resting = KEYS[6], KEYS[7], KEYS[8], KEYS[9]

-- What others have to do about this script: publish these envelopes, and advance the keys with these state ids.
local sent = {}

local function send(what)
  sent[#sent + 1] = what
end

-- Made by the first run that has any, as those of lib/kept.
local constraining
local function constraints()
  constraining = constraining or (function()
    --# include constraints
  end)()
  return constraining
end

local function leave_lines(run)
  if run.lined then constraints().leave(run) end
end

local function same_needs(run, needs)
  local own = run.needs or {}
  if #own ~= #(needs or {}) then return false end
  for position, need in ipairs(own) do
    if need.id ~= needs[position].id then return false end
  end
  return true
end

-- May a run take a slot of the key now, beside those that are reserved? Only within the least limit of all concerned.
local function fits(head, limit, reserved)
  local count = reserved or 0
  for _, other in pairs(head.active) do
    count = count + 1
    if other < limit then limit = other end
  end
  return count < limit
end

-- When the key has rested long enough since its last run, by the longest cooldown of those concerned.
local function rested_at(run)
  local packed = redis.call('HGET', kept, 'rest')
  if not packed then return 0 end
  local rest = cmsgpack.unpack(packed)
  return rest.from + math.max(rest.cooldown, run.cooldown or 0)
end

-- When the run that a waiting one is to replace is made to stop; nil if there is none.
local function stops_at(head, run)
  if not run.stop_at then return nil end
  for run_id in pairs(head.active) do
    local other = read_run(run_id)
    if other and other.task == run.task then return run.stop_at end
  end
  return nil
end

-- Until when a run may not start that has its slots already: others that ended since are rested from as well.
local function rests_until(run)
  local at = rested_at(run)
  for _, need in ipairs(run.needs or {}) do
    at = math.max(at, tonumber(redis.call('ZSCORE', resting, need.id) or '0'))
  end
  return at
end

-- waiting -> (holds its slots). Returns true; or the time at which to look again; or false: somebody who ends will.
local function take_slots(head, run)
  if not fits(head, run.limit) then
    leave_lines(run)
    return stops_at(head, run) or false
  end
  local at = rested_at(run)
  if at > now then
    leave_lines(run)
    return at
  end
  local answer = not run.needs or constraints().take(run)
  if answer == true then head.active[run.id] = run.limit end
  return answer
end

-- Is nobody waiting who came before?
local function is_first(run)
  local first = redis.call('ZRANGE', wait, 0, 0, 'WITHSCORES')
  return not first[2] or tonumber(first[2]) >= tonumber(acceptance(run))
end

-- due -> (holds its slots), if it is its turn; else, as of take_slots. A run that replaces another need not be the
-- first to have that one stopped.
local function try_to_start(head, run)
  if head.runs == 1 or is_first(run) then return take_slots(head, run) end
  return not fits(head, run.limit) and stops_at(head, run) or false
end

-- due -> waiting, by its acceptance. Whoever was the first of the key, and is not any more, stands in no line.
local function wait_in_turn(run)
  local first = redis.call('ZRANGE', wait, 0, 0)[1]
  redis.call('ZADD', wait, acceptance(run), run.id)
  if not first or first == run.id or redis.call('ZRANGE', wait, 0, 0)[1] ~= run.id then return end
  local passed = read_run(first)
  if passed then
    leave_lines(passed)
    write_run(passed)
  end
end

-- (holds its slots) -> dispatched. The caller writes head and run, and somebody publishes the envelope.
local function dispatch(run)
  run.state, run.message_at, run.unsent = 'dispatched', nil, nil
  set_timer(run, run.patience and now + run.patience or lost_at(run))
end

-- What wakes a run that may not start: the clock, if `at` is a time; else whoever ends or gives way.
-- Returns how long a new message waits, -1 for none.
local function look_again(run, at)
  if at then return schedule(run, at) end
  run.message_at, run.unsent = nil, nil
  clear_timer(run)
  return -1
end

-- Due runs into free slots, the oldest first: one that may not start yet holds back those behind it.
local function advance(head)
  if head.runs == 1 and next(head.active) then return end
  while true do
    local first = redis.call('ZRANGE', wait, 0, 0)[1]
    if not first then return end
    local run = read_run(first)
    if not run then
      redis.call('ZREM', wait, first)
    else
      local answer = take_slots(head, run)
      if answer ~= true then
        local delay = look_again(run, answer)
        if delay >= 0 then send(envelope(run, delay)) end
        write_run(run)
        return
      end
      redis.call('ZREM', wait, first)
      dispatch(run)
      write_run(run)
      send(envelope(run))
    end
  end
end

-- A run gives back whatever it holds, wherever it stands. The caller advances the key.
local function release(head, run, rests)
  if head.active[run.id] then
    head.active[run.id] = nil
    if run.needs then constraints().give_back(run, rests) end
  end
  leave_lines(run)
  if run.state == 'running' then return end
  clear_timer(run)
  redis.call('ZREM', wait, run.id)
end

-- Any state -> (gone). What is left of the session is written, or nothing at all. Returns whether it has drained.
local function forget(head, run, rests)
  close(head, run)
  release(head, run, rests)
  head.runs = head.runs - 1
  if head.runs == 0 then
    erase_record()
    return true
  end
  erase_run(run)
  advance(head)
  write_head(head)
  return false
end

-- What the call with this nonce left to others, should the call be repeated because its reply was lost.
local function sent_by(head, nonce)
  if not (head and head.ended and head.ended.nonce == nonce) then return nil end
  for _, state in ipairs(head.ended.keys) do send(state) end
  for _, run_id in ipairs(head.ended.runs) do
    local run = read_run(run_id)
    if run and (run.state == 'dispatched' or run.message_at) then
      send(envelope(run, math.max((run.message_at or now) - now, 0)))
    end
  end
  return sent
end

local function note_sent(head, nonce)
  head.ended = {nonce = nonce, keys = {}, runs = {}}
  for _, what in ipairs(sent) do
    local list = type(what) == 'table' and head.ended.runs or head.ended.keys
    list[#list + 1] = type(what) == 'table' and what[1] or what
  end
  write_head(head)
end
