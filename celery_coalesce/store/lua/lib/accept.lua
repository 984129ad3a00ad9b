-- What becomes of a trigger: shared by `trigger` and `publish` (calls) and `admit` (a message that carries no run).
-- Needs lib/record and lib/slots. ARGV: 2 key text; then of each call: arguments, call, follower ('' for none).

-- How much is remembered of single calls, in bytes: what became of the last seven or eight. How many batches a call
-- forgets at most, and at how many of the runs that go on it looks.
local MEMORY, FORGOTTEN, MENDED = 320, 1000, 8

-- What a call does not say, because it is so with nearly all.
local USUALLY = {__index = {mode = 'queue', limit = 1, max_queued = 1, overflow = 'merge', rule = 'latest'}}
setmetatable(asked, USUALLY)

-- The call that is accepted. What it asks for is `asked`.
local args, call, follower = ARGV[3], ARGV[4], ARGV[5]

-- To be called again with its own arguments: what they were merged with has begun, or somebody came between.
local AGAIN = {'merge', '', 0, ''}

local function reply(disposition, run, delay, replaced)
  return {disposition, run.id, run.state, delay, run.task_id, replaced or ''}
end

-- What a disposition tells is one text, and alone where it can be: clients take their time over every part of a reply.
local function told(answer)
  if #answer < 6 then return answer end
  local replaced = table.remove(answer)
  local text = table.concat(answer, ' ')
  return replaced == '' and text or {text, replaced}
end

local function told_alone(answer)
  local text = told(answer)
  if #sent == 0 or text == answer then return text end
  if type(text) ~= 'table' then text = {text, ''} end
  text[#text + 1] = sent
  return text
end

-- The same call again (a reply was lost, and the client asked once more) gets the same answer, given what is remembered
-- of it; nil if its run has ended.
local function repeated(disposition, run_id)
  local run = disposition and read_run(run_id)
  if not run then return nil end
  local delay = -1
  if disposition == 'dispatched' then
    delay = 0
  elseif disposition == 'queued' and run.message_at then
    delay = math.max(run.message_at - now, 0)
  end
  return reply(disposition, run, delay)
end

local function repeated_alone(head)
  local recent = get('recent') or ''
  local _, at = recent:find(asked.nonce .. ' ', 1, true)
  if not at then return nil end
  local again = repeated(recent:match('^(%S+) (%d+)', at + 1))
  if again then sent_by(head, asked.nonce) end
  return again
end

-- Of calls that are accepted in one go: what is remembered of each, by its position, from an earlier time that they
-- were asked and from this one; and the position of the one that is accepted.
local known, noted, position = nil, nil, nil

-- What was sent in one go is sent again in one go: it is remembered for a while, besides the last single calls. The
-- nonces are listed, and until when, the oldest first.
local function remember_batch(head)
  local each, till = {}, now + asked.redispatch
  for number = 1, #asked.calls do each[number] = noted[number] or known[number] or '' end
  set('did:' .. asked.nonce, cmsgpack.pack(each))
  set('batches', (get('batches') or '') .. asked.nonce .. ' ' .. whole(till) .. ';')
  head.forget_at, head.latest = head.forget_at or till, asked.nonce
  write_head(head)
end

local function forget_batches(head)
  local batches, gone, rest, following = get('batches') or '', {}, 1, nil
  for nonce, till, behind in batches:gmatch('(%S+) (%d+);()') do
    if tonumber(till) > now or #gone == FORGOTTEN then
      following = tonumber(till)
      break
    end
    gone[#gone + 1], rest = 'did:' .. nonce, behind
  end
  if following then set('batches', batches:sub(rest)) else gone[#gone + 1] = 'batches' end
  redis.call('HDEL', rec, unpack(gone))
  head.forget_at = following
  write_head(head)
end

local function remember(head, disposition, run)
  if head.forget_at and head.forget_at <= now then forget_batches(head) end
  local what = disposition .. ' ' .. run.id
  if noted then
    noted[position] = what
  else
    -- Where it is cut, an entry loses the beginning of its nonce, and is found no more.
    set('recent', ((get('recent') or '') .. asked.nonce .. ' ' .. what .. ';'):sub(-MEMORY))
    if head.latest then
      head.latest = nil
      write_head(head)
    end
  end
end

local function new_session()
  -- Who waited for a record that was lost without them waits for nothing, and must not keep this one's runs back.
  redis.call('DEL', wait)
  local session = mint()
  return {v = VERSION, key = ARGV[2], scope = asked.scope, session = session, index = 0, runs = 0,
          active = {}, open = {}}
end

-- The moment this trigger asks for: its own, or the end of a quiet period that begins now.
local function due_time()
  if asked.delay then return now + asked.delay end
  return asked.due or now + (asked.quiet or 0)
end

-- The moment until which no later trigger may put it off, if there is one.
local function latest_time()
  if asked.delay or asked.due or not asked.quiet then return due_time() end
  return asked.longest and now + asked.longest
end

local function expiry()
  if asked.ttl then return now + asked.ttl end
  return asked.expires
end

local function joins()
  return asked.mode == 'queue' or asked.mode == 'replace'
end

local function new_run(head)
  local run = setmetatable({id = mint(), task_id = asked.task_id, task = asked.task,
                            mode = asked.mode ~= 'queue' and asked.mode or nil,
                            limit = asked.limit ~= 1 and asked.limit or nil, latest = latest_time(), expires = expiry(),
                            store = asked.store, needs = asked.needs, cooldown = asked.cooldown, once = asked.once,
                            labels = asked.labels, patience = asked.patience}, USUAL)
  run.due = math.min(due_time(), run.latest or math.huge)
  if asked.grace and next(head.active) then run.stop_at = now + asked.grace end
  head.runs = head.runs + 1
  set('args:' .. run.id, args)
  if call ~= '' then set('call:' .. run.id, call) end
  if joins() then
    local open = head.open[run.task] or {}
    open[#open + 1] = run.id
    head.open[run.task] = open
  elseif run.mode == 'skip' then
    head.lone = head.lone or {}
    head.lone[run.task] = run.id
  end
  return run
end

-- (holds no slots) -> dispatched, or waiting for slots or its time. Returns how long its message waits, -1 for none.
local function place(head, run)
  if run.due > now then
    run.state = 'pending'
    return schedule(run, run.due)
  end
  local answer = try_to_start(head, run)
  if answer == true then
    if head.runs > 1 then redis.call('ZREM', wait, run.id) end
    dispatch(run)
    return 0
  end
  run.state = 'pending'
  wait_in_turn(run)
  return look_again(run, answer)
end

local function create(head)
  local run = new_run(head)
  local delay = place(head, run)
  write_run(run)
  write_head(head)
  local disposition = run.state == 'dispatched' and 'dispatched' or 'queued'
  remember(head, disposition, run)
  return reply(disposition, run, delay)
end

local function follow(run)
  if follower == '' then return end
  run.followers = run.followers + 1
  set('fol:' .. acceptance(run) .. ':' .. run.followers, follower)
end

-- Made by the first call that is answered with a run that there is, as those of lib/kept.
local flying
local function flights()
  flying = flying or (function()
    --# include flights
  end)()
  return flying
end

-- Of a burst no two runs are made, however many slots there are, and however many may wait.
local function of_a_burst(head)
  local open = head.open[asked.task] or {}
  return asked.quiet and #open > 0 and not head.active[open[#open]]
end

-- A slot that this trigger's new run could have. Runs that wait for their time hold none, but stand in for one:
-- else an earlier trigger would start a second run instead of pulling the first forward.
local function has_room(head)
  local reserved = 0
  for _, run_id in ipairs(head.open[asked.task] or {}) do
    if not head.active[run_id] then reserved = reserved + 1 end
  end
  return fits(head, asked.limit, reserved) and redis.call('EXISTS', wait) == 0
end

-- When a run is due that covers one more trigger: the earliest time that any of them asked for, except that every
-- trigger of a burst begins a new quiet period. A retry keeps its backoff.
local function merged_due(run)
  local latest = latest_time()
  if latest and (not run.latest or latest < run.latest) then run.latest = latest end
  if run.state ~= 'pending' or run.attempt > 0 then return run.due end
  if asked.quiet and not (asked.delay or asked.due) then
    return math.min(due_time(), run.latest or math.huge)
  end
  return math.min(due_time(), run.due)
end

-- Should the timers have been lost, or who waits, and the record not: a call that joins a run sees to it that the run,
-- and those before it, are moved on; of many that go on some, and others the next time. Returns the run as it is then.
local function mend(head, run)
  local count, every = 0, math.ceil(head.runs / MENDED)
  for run_id in pairs(head.active) do
    count = count + 1
    local other = (count + clock) % every == 0 and not has_timer(run_id) and read_run(run_id)
    if other and other.state ~= 'running' then
      set_timer(other, lost_at(other))
    end
  end
  if run.state ~= 'pending' or has_timer(run.id) then return run end
  if run.due > now then
    set_timer(run, run.due)
  elseif not next(head.active) then
    wait_in_turn(run)
    advance(head)
    write_head(head)
  end
  return run
end

-- unstarted -> the same run, covering one more trigger. Changes its arguments and due time alone.
local function merge(head, run)
  local replaced
  if asked.rule == 'merge' and (asked.target ~= run.id or asked.base ~= run.version) then
    -- The merge function is Python's: hand out what there is, and take the union only if nothing came between.
    return {'merge', run.id, run.version, get('args:' .. run.id)}
  end
  local needs = run.needs
  if asked.rule ~= 'first' then
    if asked.watch then replaced = get('args:' .. run.id) end
    -- The arguments are the later trigger's from now on, and with them what they need of others.
    set('args:' .. run.id, args)
    run.version = run.version + 1
    if not same_needs(run, asked.needs) then needs = asked.needs end
  end
  run.triggers = run.triggers + 1
  run.store = run.store or asked.store
  local expires = expiry()
  if not expires then
    run.expires = nil
  elseif run.expires and expires > run.expires then
    run.expires = expires
  end
  local due = merged_due(run)
  local moved = due ~= run.due or needs ~= run.needs
  if moved then
    local message_out = run.state == 'dispatched'
    release(head, run, false)
    run.due, run.needs = due, needs
    local delay = place(head, run)
    if delay >= 0 and not (message_out and run.state == 'dispatched') then
      send(envelope(run, delay))
    end
  end
  follow(run)
  write_run(run)
  if moved then
    -- Others may go where it stood, or it where others do.
    advance(head)
    if #sent > 0 then note_sent(head, asked.nonce) else write_head(head) end
  end
  remember(head, 'coalesced', run)
  return reply('coalesced', run, -1, replaced)
end

-- The run that has done already what a trigger asks for: once, or for another beat at the same tick.
local function done_for()
  local done = asked.once and outliving().done_once(asked.task)
  if done or not asked.tick then return done end
  local packed = redis.call('HGET', kept, 'tick:' .. asked.tick.entry)
  local last = packed and cmsgpack.unpack(packed)
  if not last or last.by == asked.tick.by or last.moment ~= asked.tick.moment then return nil end
  return last.at + asked.tick.lasts > now and last or nil
end

-- A tick of a schedule has its run: should another beat fire it as well, it needs no other. A beat's own ticks are all
-- its own, however soon one comes after the other.
local function note_tick(answer)
  if asked.tick and answer[1] ~= 'merge' and answer[1] ~= 'rejected' then
    outliving().keep('tick:' .. asked.tick.entry, {run = answer[2], task_id = answer[5], by = asked.tick.by,
                                       moment = asked.tick.moment, at = now, till = now + asked.tick.lasts})
  end
  return answer
end

-- By the rules of its mode: a run that there is, or a new one.
local function cover(head)
  if not head then
    if asked.target or asked.behind then return AGAIN end
    head = new_session()
  elseif asked.behind and asked.behind ~= head.latest then
    -- Of a chain of merges that is broken nothing counts, though the versions may happen to agree.
    return AGAIN
  end
  if asked.mode == 'skip' then
    local run = flights().under_way(head)
    if run then
      -- From now on runs of this task say when their body has returned: skip calls look at it.
      if run.mode ~= 'skip' then redis.call('HSET', meta, 'skips:' .. run.task, '1') end
      return flights().join(head, run)
    end
  end
  local open = head.open[asked.task] or {}
  if not joins() or (not of_a_burst(head) and (has_room(head) or #open < asked.max_queued)) then
    if asked.target then return AGAIN end
    return create(head)
  end
  local last = read_run(open[#open])
  if asked.overflow == 'reject' then return reply('rejected', last, -1) end
  return merge(head, mend(head, last))
end

-- Returns what became of the trigger, and whether that was known.
local function accept()
  local head = read_head()
  local again
  if not known then
    again = head and repeated_alone(head)
  elseif known[position] then
    again = repeated(known[position]:match('^(%S+) (%d+)$'))
  end
  if again then return again, true end
  local done = done_for()
  if not done then return note_tick(cover(head)) end
  local run = head and read_run(done.run)
  if run and run.state ~= 'cleared' then return flights().join(head, run) end
  return reply('skipped', {id = done.run, task_id = done.task_id, state = 'ended'}, -1)
end

-- Calls of one key that are sent in one go. Each has its own of what is asked, and all the rest is all of theirs.
local function accept_many(push)
  local all, head, answers, broken = asked, read_head(), {}, false
  local shared = {__index = all}
  local packed = head and redis.call('HGET', rec, 'did:' .. asked.nonce)
  known, noted = packed and cmsgpack.unpack(packed) or {}, {}
  sent_by(head, asked.nonce)
  for number, own in ipairs(all.calls) do
    asked, position = setmetatable(own, shared), number
    args, call, follower = unpack(ARGV, 3 * number, 3 * number + 2)
    -- Merges build upon one another: behind one that is to be made again, all are.
    local answer, again = AGAIN, false
    if not broken then answer, again = accept() end
    broken = answer[1] == 'merge'
    if push and number == 1 then push(answer, again) end
    answers[number] = told(answer)
  end
  asked = all
  if next(noted) then remember_batch(read_head()) end
  return {answers, sent}
end

-- Accepts the script's calls, and returns what it tells of them.
--   push: given what became of the first, and whether that was known, pushes its message.
local function accept_all(push)
  if asked.calls then return accept_many(push) end
  local answer, again = accept()
  if push then push(answer, again) end
  return told_alone(answer)
end
