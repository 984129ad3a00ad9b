-- Reads a record.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting
-- ARGV: asked (JSON: state and, for one run alone, run)
-- Returns: idle; or record, key, JSON of the head and of its runs
-- Transition: none
-- Order: nothing is written but the version of a record that is older.
--# include record
local head = read_head()
if not head then return {'idle'} end
local one = asked.run and 'run:' .. asked.run
local fields = one and {one, redis.call('HGET', rec, one)} or redis.call('HGETALL', rec)
local runs = {}
for position = 1, #fields, 2 do
  if fields[position]:sub(1, 4) == 'run:' and fields[position + 1] then
    local run = unpacked(fields[position]:sub(5), fields[position + 1])
    for name, value in pairs(USUAL.__index) do
      if rawget(run, name) == nil then run[name] = value end
    end
    run.seq = acceptance(run)
    runs[#runs + 1] = run
  end
end
-- JSON is for text, and a key may be no such.
local key = head.key
head.key = nil
return {'record', key, cjson.encode({head = head, runs = runs, now = now})}
