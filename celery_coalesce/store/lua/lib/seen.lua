-- The tombstones: what was done already, and may be asked for again. They are bounded, and expire by themselves.

local function was_seen(seen, member, at)
  local expires = redis.call('ZSCORE', seen, member)
  return expires and tonumber(expires) > at
end

local function remember(seen, member, at, milliseconds)
  redis.call('ZREMRANGEBYSCORE', seen, '-inf', string.format('%.0f', at))
  redis.call('ZADD', seen, string.format('%.0f', at + milliseconds), member)
  if redis.call('PTTL', seen) < milliseconds then redis.call('PEXPIRE', seen, milliseconds) end
end
