-- Reads what is remembered of a task.
--
-- KEYS: history
-- ARGV: asked (JSON: task)
-- Returns: history, runs, errors, last error ('' once a run has succeeded), and of the last run: run,
--   task id, end in ms, outcome
-- Transition: none
-- Order: nothing is written.
local asked = cjson.decode(ARGV[1])
local found = redis.call('HMGET', KEYS[1], 'runs:' .. asked.task, 'errors:' .. asked.task, 'error:' .. asked.task,
                         'last:' .. asked.task)
local last = found[4] and cmsgpack.unpack(found[4])
return {'history', found[1] or '0', found[2] or '0', found[3] or '',
        last and {last.run, last.task_id, last.at, last.outcome} or {}}
