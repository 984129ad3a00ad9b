-- Waits for the message that the broker gives back, or that the caller publishes anew.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting, held
-- ARGV: asked (JSON: state, run, token, redispatch)
-- Returns: dispatched, envelopes (for whoever does not trust the broker to give it back); or lost
-- Transition: running -> dispatched
-- Order: the timer before the holder's index goes, so that one of the two always finds the run.
--# include record
local head = read_head()
local run = head and read_run(asked.run)
if run and run.state == 'dispatched' and run.requeued == asked.token then
  return flush({'dispatched', {envelope(run)}})
end
if not run or run.state ~= 'running' or run.token ~= asked.token then return {'lost'} end
run.requeued = run.token
run.state, run.token, run.owner, run.claim, run.losses, run.again = 'dispatched', nil, nil, nil, 0, true
run.returned = nil
set_timer(run, now + asked.redispatch)
write_run(run)
redis.call('SREM', KEYS[10], ref(run))
return flush({'dispatched', {envelope(run)}})
