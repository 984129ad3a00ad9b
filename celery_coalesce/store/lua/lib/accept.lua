-- What becomes of a trigger: shared by `trigger` (a call) and `admit` (a message that carries no run).
-- Needs lib/record. ARGV: 2 key text, 3 arguments, 4 call, 5 follower ('' for none).

local RECENT = 8

local function reply(disposition, run, delay, extra)
  extra = extra or {}
  return {disposition, run.id, run.task_id, run.state, delay, extra.replaced or '', extra.sent or {}}
end

-- The same call again (a reply was lost, and the client asked once more) gets the same answer.
local function repeated(head)
  for position = 1, #head.recent, 3 do
    if head.recent[position] == asked.nonce then
      local run = read_run(head.recent[position + 2])
      if not run then return nil end
      local delay = -1
      if head.recent[position + 1] == 'dispatched' then
        delay = 0
      elseif run.state == 'pending' and head.recent[position + 1] == 'queued' and not run.unsent
        and not redis.call('ZSCORE', wait, run.id) then
        delay = math.max(run.due - now, 0)
      end
      local sent = run.pulled == asked.nonce and {envelope(run, math.max(run.due - now, 0))} or {}
      return reply(head.recent[position + 1], run, delay, {sent = sent})
    end
  end
  return nil
end

local function remember(head, disposition, run)
  local recent = head.recent
  if #recent >= 3 * RECENT then
    for _ = 1, 3 do table.remove(recent, 1) end
  end
  recent[#recent + 1] = asked.nonce
  recent[#recent + 1] = disposition
  recent[#recent + 1] = run.id
  write_head(head)
end

local function new_session()
  redis.call('HSET', rec, 'key', ARGV[2])
  return {v = VERSION, scope = asked.scope, session = mint(), index = 0, runs = 0,
          active = {}, open = {}, lone = {}, recent = {}}
end

-- The moment this trigger asks for, and the one from which it is worthless.
local function due_time()
  if asked.delay then return now + asked.delay end
  return asked.due or now
end

local function expiry()
  if asked.ttl then return now + asked.ttl end
  return asked.expires
end

local function new_run(head)
  local run = {id = mint(), task_id = asked.task_id, task = asked.task, mode = asked.mode, limit = asked.limit,
               due = due_time(), expires = expiry(), store = asked.store, triggers = 1, attempt = 0,
               version = 0, followers = 0, told = 0, losses = 0}
  run.seq = run.id
  run.box = run.id
  head.runs = head.runs + 1
  redis.call('HSET', rec, 'args:' .. run.id, ARGV[3])
  if ARGV[4] ~= '' then redis.call('HSET', rec, 'call:' .. run.id, ARGV[4]) end
  if run.mode == 'queue' then
    local open = head.open[run.task] or {}
    open[#open + 1] = run.id
    head.open[run.task] = open
  elseif run.mode == 'skip' then
    head.lone[run.task] = run.id
  end
  return run
end

-- (none) or not due -> dispatched, waiting, or waiting for its time.
local function place(head, run)
  if run.due > now then
    run.state = 'pending'
    return schedule(run)
  end
  clear_timer(run)
  if none_waiting() and fits(head, run.limit) then
    dispatch(head, run)
    return 0
  end
  run.state = 'pending'
  redis.call('ZADD', wait, run.seq, run.id)
  return -1
end

local function create(head)
  local run = new_run(head)
  local delay = place(head, run)
  write_run(run)
  local disposition = run.state == 'dispatched' and 'dispatched' or 'queued'
  remember(head, disposition, run)
  return reply(disposition, run, delay)
end

local function follow(run)
  if ARGV[5] == '' then return end
  run.followers = run.followers + 1
  redis.call('HSET', rec, 'fol:' .. run.box .. ':' .. run.followers, ARGV[5])
end

-- One flight: the run of this task that is under way or waiting. Not the one whose own body, links or chain call.
local function flight(head)
  for run_id in pairs(head.active) do
    local run = read_run(run_id)
    if run and run.task == asked.task and not run.returned and run.id ~= asked.within then return run end
  end
  local waiting = head.lone[asked.task]
  local open = head.open[asked.task]
  waiting = waiting or (open and open[#open])
  return waiting and read_run(waiting) or nil
end

-- A slot that this trigger's new run could have. Runs that wait for their time hold none, but stand in for one:
-- else an earlier trigger would start a second run instead of pulling the first forward.
local function has_room(head)
  if not none_waiting() then return false end
  local reserved = 0
  if asked.mode == 'queue' then
    for _, run_id in ipairs(head.open[asked.task] or {}) do
      if not head.active[run_id] then reserved = reserved + 1 end
    end
  end
  return fits(head, asked.limit, reserved)
end

-- unstarted -> the same run, covering one more trigger. Changes its arguments and due time alone.
local function merge(head, run)
  local extra = {}
  if asked.rule == 'merge' and (asked.target ~= run.id or asked.base ~= run.version) then
    -- The merge function is Python's: hand out what there is, and take the union only if nothing came between.
    return {'merge', run.id, run.version, redis.call('HGET', rec, 'args:' .. run.id)}
  end
  if asked.rule ~= 'first' then
    if asked.watch then extra.replaced = redis.call('HGET', rec, 'args:' .. run.id) end
    redis.call('HSET', rec, 'args:' .. run.id, ARGV[3])
    run.version = run.version + 1
  end
  run.triggers = run.triggers + 1
  run.store = run.store or asked.store
  local expires = expiry()
  if not expires then
    run.expires = nil
  elseif run.expires and expires > run.expires then
    run.expires = expires
  end
  local due = due_time()
  if run.due > now and due < run.due then
    run.due = due
    run.unsent = nil
    local delay = place(head, run)
    if delay >= 0 then
      extra.sent = {envelope(run, delay)}
      run.pulled = asked.nonce
    end
  end
  follow(run)
  write_run(run)
  remember(head, 'coalesced', run)
  return reply('coalesced', run, -1, extra)
end

local function accept()
  local head = read_head()
  if not head then
    head = new_session()
  else
    local again = repeated(head)
    if again then return again end
  end
  if asked.mode == 'skip' then
    local run = flight(head)
    if run then
      if run.state ~= 'running' then run.store = run.store or asked.store end
      run.joined = true
      -- From now on runs of this task say when their body has returned: skip calls look at it.
      if run.mode ~= 'skip' then redis.call('HSET', meta, 'skips:' .. run.task, '1') end
      follow(run)
      write_run(run)
      remember(head, 'skipped', run)
      return reply('skipped', run, -1)
    end
  end
  if asked.mode ~= 'queue' or has_room(head) then return create(head) end
  local open = head.open[asked.task] or {}
  if #open < asked.max_queued then return create(head) end
  local last = read_run(open[#open])
  if asked.overflow == 'reject' then return reply('rejected', last, -1) end
  return merge(head, last)
end
