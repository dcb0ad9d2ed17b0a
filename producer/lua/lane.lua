-- Shared by the scripts that deliver references: where a lane is, and what a reference says.

-- Id of the last reference that was delivered.
local function last_delivered(lane)
  local info = redis.call('XINFO', 'GROUPS', lane)[1]
  if not info then -- a stream that no enqueue made
    redis.call('XGROUP', 'CREATE', lane, GROUP, 0)
    return '0-0'
  end
  for i = 1, #info, 2 do
    if info[i] == 'last-delivered-id' then
      return info[i + 1]
    end
  end
end

-- What a reference says: request id and charge; nil for one that no enqueue wrote.
local function read_reference(fields)
  local cost, most = tonumber(fields[4]), tonumber(fields[6])
  if fields[1] == 'id' and is_sound(cost) and is_sound(most) then
    return fields[2], cost + most
  end
end
