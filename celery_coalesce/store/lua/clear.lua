-- Takes what has not started out of the queue, a page at a time. A run in progress keeps its slots.
--
-- KEYS: record, waiting, meta, timers, kept, limits, slots, lines, resting
-- ARGV: asked (JSON: state, cursor, bound, task ('' for all), lease, redispatch, soon, outcome, why, forget (what was
--   done once is to be done again) and, if a run asks, run and token)
-- Returns: lost; or cleared, next cursor, bound, how many, what is to be sent, and what tells the callers of those
--   runs that the caller tells
-- Transition: pending, dispatched -> cleared
-- Order: a cleared run has its timer before it leaves the queue, so that its callers are told whoever dies.
--# include record
--# include slots
--# include cleared

local PAGE = 100

local function forget_done()
  if not asked.forget then return end
  for _, field in ipairs(redis.call('HKEYS', kept)) do
    local task = field:match('^once:(.*)$')
    if task and (asked.task == '' or task == asked.task) then redis.call('HDEL', kept, field) end
  end
  if redis.call('EXISTS', kept) == 1 then outliving().expire() end
end

local function clear()
  local head = read_head()
  if asked.run then
    local run = head and read_run(asked.run)
    if not run or run.token ~= asked.token then return {'lost'} end
  end
  forget_done()
  local bound = asked.bound or redis.call('HGET', meta, 'last')
  if not head then return {'cleared', '0', bound or '0', 0, {}, {}} end
  local page = redis.call('HSCAN', rec, asked.cursor, 'MATCH', 'run:*', 'COUNT', PAGE)
  local count, cleared = 0, {}
  for position = 2, #page[2], 2 do
    local run = unpacked(page[2][position - 1]:sub(5), page[2][position])
    local unstarted = run.state == 'pending' or run.state == 'dispatched'
    if unstarted and (asked.task == '' or run.task == asked.task) and tonumber(run.id) <= tonumber(bound) then
      count = count + 1
      -- Monitors wait for the end of a message that they saw, and only a worker may tell them: at its next beat.
      take_out(head, run, asked.outcome, asked.why, run.received and now or now + asked.lease)
      write_run(run)
      if not run.received then cleared[#cleared + 1] = cleared_run(head, run) end
    end
  end
  advance(head)
  write_head(head)
  return {'cleared', page[1], bound, count, sent, cleared}
end

return flush(clear())
