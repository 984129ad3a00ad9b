-- Asks whether a lease still holds; marks that the body has returned.
--
-- KEYS: record, waiting, meta, timers
-- ARGV: asked (JSON: state, run, token, returned, after)
-- Returns: running, and, asked for with after, followers from there on; or lost
-- Transition: running -> running
-- Order: one write.
--# include record
local head = read_head()
local run = head and read_run(asked.run)
if not run or run.state ~= 'running' or run.token ~= asked.token then return {'lost'} end
if asked.returned then
  run.returned = true
  write_run(run)
end
local answer = {'running'}
if asked.after then
  for number = run.told + asked.after + 1, math.min(run.followers, run.told + asked.after + 100) do
    answer[#answer + 1] = redis.call('HGET', rec, 'fol:' .. run.box .. ':' .. number)
  end
end
return answer
