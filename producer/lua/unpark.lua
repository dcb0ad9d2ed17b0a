#!lua flags=allow-oom
-- Cancel requests that are parked.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     tenant ('': all), priority ('': all); ids
-- Returns  how many were cancelled: those that are still parked, and of this tenant and priority
-- Twice    0

-- @include record

local T, tenant, priority = KEYS[1], ARGV[1], ARGV[2]
local now, cancelled = now_ms(), 0

settling(T, function()
  for i = 3, #ARGV do
    local r = load(T, ARGV[i])
    if r and r.state == 'park' and (tenant == '' or tenant == r.tenant)
      and (priority == '' or priority == r.priority) then
      r.epoch = r.epoch + 1
      finish_record(T, r, now, { finish = 'cancelled', reason = 'purged by an operator' })
      cancelled = cancelled + 1
    end
  end
end)
return cancelled
