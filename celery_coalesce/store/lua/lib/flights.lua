-- Calls that no run is made for: one there is answers them. Needs what lib/accept defines before it includes this.

-- (any) -> the same run, which answers one more caller and sees nothing of its call.
local function join(head, run)
  if run.state ~= 'running' then run.store = run.store or asked.store end
  run.joined = true
  follow(run)
  write_run(run)
  remember(head, 'skipped', run)
  return reply('skipped', run, -1)
end

-- One flight: the run of this task that is under way or waiting. Not the one whose own body, links or chain call.
local function under_way(head)
  for run_id in pairs(head.active) do
    local run = read_run(run_id)
    if run and run.task == asked.task and not run.returned and run.id ~= asked.within then return run end
  end
  local waiting = head.lone and head.lone[asked.task]
  local open = head.open[asked.task]
  waiting = waiting or (open and open[#open])
  return waiting and read_run(waiting) or nil
end

return {join = join, under_way = under_way}
