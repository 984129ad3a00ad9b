-- `replace`: a waiting run's predecessor has been asked to stop for long enough. Needs lib/record, lib/slots and
-- lib/cleared.

-- waiting -> the same, its predecessor to be stopped; or dispatched, if that only waited for a retry.
local function stop(head, run)
  local processes = {}
  for run_id in pairs(head.active) do
    local other = read_run(run_id)
    if other and other.task == run.task then
      if other.state == 'running' then
        processes[#processes + 1] = {other.owner, other.task_id, other.id}
      elseif other.state == 'retrying' then
        take_out(head, other, 'stopped', 'superseded', now)
        write_run(other)
      end
    end
  end
  -- Whoever does not hear of it is told again.
  run.stop_at, run.stopped = now + asked.lease, asked.nonce
  schedule(run, run.stop_at)
  write_run(run)
  advance(head)
  write_head(head)
  return {'stop', processes, sent}
end
