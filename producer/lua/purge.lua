#!lua flags=allow-oom
-- Cancel requests that nobody runs: those that wait, in their order, and those that are parked.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     tenant ('': all), priority ('': all), most to look at, parked ones to pass over
-- Returns  {cancelled, references looked at, parked ones looked at and left}
-- Twice    the second run goes on with the next

-- @include record

local T, tenant, priority = KEYS[1], ARGV[1], ARGV[2]
local budget, skip = tonumber(ARGV[3]), tonumber(ARGV[4])
local now = now_ms()
local cancelled, seen, left = 0, 0, 0

local function cancel(r)
  r.epoch = r.epoch + 1
  finish_record(T, r, now, { finish = 'cancelled', reason = 'purged by an operator' })
  cancelled = cancelled + 1
end

-- Delivering in order keeps the group's lag known.
local function purge_lane(lanes, p, name)
  local lane = T .. ':in:' .. p .. ':' .. name
  if redis.call('EXISTS', lane) == 1 then
    local read = redis.call('XREADGROUP', 'GROUP', GROUP, 'workers', 'COUNT', budget - seen,
      'STREAMS', lane, '>')
    for _, entry in ipairs(read and read[1][2] or {}) do
      seen = seen + 1
      local r = load(T, entry[2][2])
      if r and r.state == 'wait' and r.entry == entry[1] then
        r.state = 'park' -- delivered, owned by nobody: ending it drops the reference too
        cancel(r)
      else
        drop_entry(lane, entry[1])
      end
    end
  end
  settle(T) -- which deletes a lane that is empty now
  if redis.call('EXISTS', lane) == 0 then
    forget_lane(T, p, name)
  end
end

settling(T, function()
  for p = 0, 2 do
    if priority == '' or priority == tostring(p) then
      local lanes = T .. ':lanes:' .. p
      for _, name in ipairs(redis.call('ZRANGE', lanes, 0, -1)) do
        if seen < budget and (tenant == '' or tenant == name) then
          purge_lane(lanes, p, name)
        end
      end
    end
  end
  if seen < budget then
    for _, id in ipairs(redis.call('ZRANGE', T .. ':park', skip, skip + budget - seen - 1)) do
      local r = load(T, id)
      if r and (tenant == '' or tenant == r.tenant) and (priority == '' or priority == r.priority) then
        cancel(r)
      else
        left = left + 1
      end
    end
  end
end)
return { cancelled, seen, left }
