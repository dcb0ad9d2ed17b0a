#!lua flags=allow-oom
-- Park requests that the server takes for a worker's, and that it does not run: a server that
-- rolled back has forgotten that they were ended or given back. The attempt does not count.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     worker; ids
-- Returns  how many were parked
-- Twice    0

-- @include record

local T, worker = KEYS[1], ARGV[1]
local now, parked = now_ms(), 0

settling(T, function()
  for i = 2, #ARGV do
    local r = load(T, ARGV[i])
    if r and r.state == 'run' and r.worker == worker then
      park_record(T, r, now, now, math.max(r.attempts - 1, 0))
      parked = parked + 1
    else
      redis.call('SREM', T .. ':own:' .. worker, ARGV[i])
    end
  end
end)
if parked > 0 then
  wake(T, 'wake')
end
return parked
