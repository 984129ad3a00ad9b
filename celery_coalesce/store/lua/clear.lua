-- Takes what has not started out of the queue, a page at a time. A run in progress keeps its slot.
--
-- KEYS: record, waiting, meta, timers
-- ARGV: asked (JSON: state, cursor, bound, task ('' for all), lease, redispatch)
-- Returns: cleared, next cursor, bound, envelopes to publish, then per run: run, token, task id, task, call, session
-- Transition: pending, dispatched -> cleared
-- Order: a cleared run has its timer before it leaves the queue, so that its callers are told whoever dies.
--# include record

local PAGE = 500

local function clear()
  local head = read_head()
  local bound = asked.bound or redis.call('HGET', meta, 'last')
  if not head then return {'cleared', '0', bound or '0', {}} end
  local page = redis.call('HSCAN', rec, asked.cursor, 'MATCH', 'run:*', 'COUNT', PAGE)
  local cleared = {}
  for position = 2, #page[2], 2 do
    local run = cmsgpack.unpack(page[2][position])
    local unstarted = run.state == 'pending' or run.state == 'dispatched'
    if unstarted and (asked.task == '' or run.task == asked.task) and tonumber(run.id) <= tonumber(bound) then
      run.state, run.token = 'cleared', mint()
      set_timer(run, now + asked.lease)
      redis.call('ZREM', wait, run.id)
      close(head, run)
      head.active[run.id] = nil
      write_run(run)
      cleared[#cleared + 1] = {run.id, run.token, run.task_id, run.task,
                               redis.call('HGET', rec, 'call:' .. run.id) or '', head.session}
    end
  end
  local sent = promote(head)
  write_head(head)
  return {'cleared', page[1], bound, sent, cleared}
end

return clear()
