-- What a server that came back, or took over from another, may have lost.
--
-- It has all that was told to the server before it up to some moment, and nothing that came later. So before it gives
-- out a number of its own, the last one that it has is where a gap begins, and its clock is where that ends: what was
-- given out in between may be lost, and all that was given out before is either there, or has ended.

local MOST_GAPS = 20

-- The server's own run id, which changes when it restarts or another takes over. '' where INFO is not allowed. A
-- function of the server (store/scripts.py) asks once: it does not outlive the process.
local own_id
local function server_id()
  if not own_id then
    local info = redis.pcall('INFO', 'server')
    local at = type(info) == 'string' and info:find('run_id:', 1, true)
    own_id = at and info:sub(at + 7, at + 46) or ''
  end
  return own_id
end

-- The gaps, as pairs of numbers. Before they were written down, all that was given out before `since` was in one.
local function gaps_of(meta)
  local stored = redis.call('HMGET', meta, 'gaps', 'since')
  return stored[1] and cmsgpack.unpack(stored[1]) or {{0, tonumber(stored[2] or '0')}}
end

local function add_gap(meta, server, last, clock)
  local gaps = gaps_of(meta)
  gaps[#gaps + 1] = {last, clock}
  if #gaps > MOST_GAPS then
    gaps[2][1] = gaps[1][1]
    table.remove(gaps, 1)
  end
  redis.call('HSET', meta, 'server', server, 'gaps', cmsgpack.pack(gaps))
end

-- The last number that was given out, 0 if there was none or it was lost, once a server other than the one that gave it
-- has been noticed; `clock` is in microseconds.
local function last_number(meta, clock)
  local stored = redis.call('HMGET', meta, 'last', 'server')
  local server, last = server_id(), tonumber(stored[1] or '0')
  if stored[2] ~= server then add_gap(meta, server, last, clock) end
  return last
end

local function may_be_lost(meta, number, clock)
  -- Given out by another server, while this one did not know of it.
  if number > last_number(meta, clock) then return true end
  for _, gap in ipairs(gaps_of(meta)) do
    if gap[1] < number and number < gap[2] then return true end
  end
  return false
end
