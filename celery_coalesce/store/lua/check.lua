-- Asks whether a lease still holds, and whether a newer trigger waits; marks that the body has returned.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting
-- ARGV: asked (JSON: state, run, token, returned, after)
-- Returns: running, 1 if superseded, and, asked for with after, followers from there on; or lost
-- Transition: running -> running
-- Order: one write.
--# include record
local head = read_head()
local run = head and read_run(asked.run)
if not run or run.state ~= 'running' or run.token ~= asked.token then return {'lost'} end
if asked.returned and not run.returned then
  run.returned = true
  write_run(run)
end
-- One that has a slot beside this run does not wait for its end.
local superseded = '0'
for _, run_id in ipairs(head.open[run.task] or {}) do
  if not head.active[run_id] then superseded = '1' end
end
local answer = {'running', superseded}
if asked.after then
  for number = run.told + asked.after + 1, math.min(run.followers, run.told + asked.after + 100) do
    answer[#answer + 1] = redis.call('HGET', rec, 'fol:' .. acceptance(run) .. ':' .. number)
  end
end
return flush(answer)
