-- What outlives an idle key because it was asked for, and for no longer than that: values have a `till`, in ms, or are
-- kept for ever. Needs what lib/record defines before it includes this.

local function expire()
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
  expire()
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
  if #fields > 0 and redis.call('EXISTS', kept) == 1 then expire() end
end

-- The success after which further triggers of a task need no run.
local function done_once(task)
  local packed = redis.call('HGET', kept, 'once:' .. task)
  local done = packed and cmsgpack.unpack(packed)
  return done and (not done.till or done.till > now) and done or nil
end

return {expire = expire, keep = keep, rest_from_now = rest_from_now, forget_ticks = forget_ticks, done_once = done_once}
