-- What a server that came back, or took over from another, may have lost.
--
-- It has all that was told to the server before it up to some moment, and nothing that came later. Each heartbeat marks
-- the last number that was given out. So what is missing of the runs up to that mark has ended; and what was given out
-- between the mark and the moment at which another server was noticed, may have been lost: that is a gap.

local MOST_GAPS = 20

-- The server's own run id, which changes when it restarts or another takes over. '' where INFO is not allowed.
local function server_id()
  local info = redis.pcall('INFO', 'server')
  return type(info) == 'string' and info:match('run_id:(%w+)') or ''
end

-- Starts a namespace, or one that has lost its numbers: whatever was given out before may be lost.
local function begin_numbers(meta, number)
  redis.call('HSET', meta, 'server', server_id(), 'gaps', cmsgpack.pack({{0, number}}))
end

-- The gaps, as pairs of numbers, once another server than the last one has been noticed; `clock` is in microseconds.
local function gaps_of(meta, clock)
  local stored = redis.call('HMGET', meta, 'server', 'mark', 'gaps', 'since')
  -- Before there were marks, all that was given out before a number counted as lost.
  local gaps = stored[3] and cmsgpack.unpack(stored[3]) or {{0, tonumber(stored[4] or clock)}}
  local server = server_id()
  if stored[1] ~= server then
    gaps[#gaps + 1] = {tonumber(stored[2] or '0'), clock}
    if #gaps > MOST_GAPS then
      gaps[2][1] = gaps[1][1]
      table.remove(gaps, 1)
    end
    redis.call('HSET', meta, 'server', server, 'gaps', cmsgpack.pack(gaps))
  end
  return gaps
end

-- Marks the numbers that were given out so far: this server has them.
local function mark_numbers(meta, clock)
  gaps_of(meta, clock)
  local last = redis.call('HGET', meta, 'last')
  if last then redis.call('HSET', meta, 'mark', last) end
end

local function may_be_lost(meta, number, clock)
  for _, gap in ipairs(gaps_of(meta, clock)) do
    if gap[1] < number and number < gap[2] then return true end
  end
  -- Given out by another server, while this one did not know of it.
  return number > tonumber(redis.call('HGET', meta, 'last') or '0')
end
