-- The constraints that runs of any key share: their slots, their lines, and their rests.
--
-- Needs lib/record, and what lib/slots defines before it includes this. Members begin with the constraint's id and '/';
-- '0' is the character after '/'.

local function line_place(need, run)
  local accepted = acceptance(run)
  return need.id .. '/' .. string.rep('0', 20 - #accepted) .. accepted .. '/' .. ref(run)
end

local function first_in_line(id)
  return redis.call('ZRANGEBYLEX', lines, '[' .. id .. '/', '(' .. id .. '0', 'LIMIT', 0, 1)[1]
end

local function taken(id)
  return redis.call('ZLEXCOUNT', slots, '[' .. id .. '/', '(' .. id .. '0')
end

local function known_limit(id)
  local packed = redis.call('HGET', limits, id)
  return packed and cmsgpack.unpack(packed) or {}
end

local function note_limit(need)
  local known = known_limit(need.id)
  known.name, known.limit = need.name, need.limit
  redis.call('HSET', limits, need.id, cmsgpack.pack(known))
end

-- Nothing of an idle constraint stays but a limit that was set.
local function tidy(id)
  if taken(id) == 0 and not first_in_line(id) and not known_limit(id).set then redis.call('HDEL', limits, id) end
end

-- Whoever waits first may have been given way. Its own timer makes sure that somebody looks.
local function nudge(id)
  local first = first_in_line(id)
  if not first then return end
  local state, run_id = first:match('^[^/]*/[^/]*/([^/]*)/(.*)$')
  if state == asked.state then return end
  redis.call('ZADD', timers, now, state .. '/' .. run_id)
  send(state)
end

local function leave(run)
  run.lined = nil
  for _, need in ipairs(run.needs) do redis.call('ZREM', lines, line_place(need, run)) end
  for _, need in ipairs(run.needs) do
    nudge(need.id)
    tidy(need.id)
  end
end

-- All constraints at once, or none. Returns true; or the time from which on, if only clocks stand in the way; or
-- false: then the run stands in line, and is nudged.
local function take(run)
  local free, at = true, 0
  for _, need in ipairs(run.needs) do
    local first = first_in_line(need.id)
    local limit = known_limit(need.id).set or need.limit
    local older = first and tonumber(first:match('^[^/]*/([^/]*)/')) or math.huge
    if older < tonumber(acceptance(run)) or taken(need.id) >= limit then free = false end
    at = math.max(at, tonumber(redis.call('ZSCORE', resting, need.id) or '0'))
  end
  if free and at <= now then
    for _, need in ipairs(run.needs) do
      redis.call('ZADD', slots, 0, need.id .. '/' .. ref(run))
      note_limit(need)
    end
    if run.lined then leave(run) end
    return true
  end
  if not run.lined then
    run.lined = true
    for _, need in ipairs(run.needs) do
      redis.call('ZADD', lines, 0, line_place(need, run))
      note_limit(need)
    end
  end
  return free and at
end

-- The run has gone on, and holds its slots no longer. `rests`: it had begun, so that its constraints rest now.
local function give_back(run, rests)
  for _, need in ipairs(run.needs) do
    redis.call('ZREM', slots, need.id .. '/' .. ref(run))
    if rests and need.cooldown > 0 then
      local till = now + need.cooldown
      redis.call('ZREMRANGEBYSCORE', resting, '-inf', now)
      redis.call('ZADD', resting, till, need.id)
      redis.call('PEXPIRE', resting, whole(math.max(redis.call('PTTL', resting), need.cooldown)))
    end
  end
  for _, need in ipairs(run.needs) do
    nudge(need.id)
    tidy(need.id)
  end
end

return {leave = leave, take = take, give_back = give_back}
