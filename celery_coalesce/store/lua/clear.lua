-- Takes what has not started out of the queue, a page at a time. A run in progress keeps its slot.
--
-- KEYS: record, waiting, meta, timers
-- ARGV: asked (JSON: state, cursor, bound, task ('' for all), lease, redispatch)
-- Returns: cleared, next cursor, bound, how many, envelopes to publish, and the runs that the caller tells of: run,
--   token, task id, task, call, session, triggers, key, scope, 0, ''
-- Transition: pending, dispatched -> cleared
-- Order: a cleared run has its timer before it leaves the queue, so that its callers are told whoever dies.
--# include record
--# include cleared

local PAGE = 500

local function clear()
  local head = read_head()
  local bound = asked.bound or redis.call('HGET', meta, 'last')
  if not head then return {'cleared', '0', bound or '0', 0, {}, {}} end
  local page = redis.call('HSCAN', rec, asked.cursor, 'MATCH', 'run:*', 'COUNT', PAGE)
  local count, cleared = 0, {}
  for position = 2, #page[2], 2 do
    local run = cmsgpack.unpack(page[2][position])
    local unstarted = run.state == 'pending' or run.state == 'dispatched'
    if unstarted and (asked.task == '' or run.task == asked.task) and tonumber(run.id) <= tonumber(bound) then
      run.state, run.token = 'cleared', mint()
      count = count + 1
      -- Monitors wait for the end of a message that they saw, and only a worker may tell them: at its next beat.
      set_timer(run, run.received and now or now + asked.lease)
      redis.call('ZREM', wait, run.id)
      close(head, run)
      head.active[run.id] = nil
      write_run(run)
      if not run.received then cleared[#cleared + 1] = {run.id, unpack(cleared_run(head, run))} end
    end
  end
  local sent = promote(head)
  write_head(head)
  return {'cleared', page[1], bound, count, sent, cleared}
end

return clear()
