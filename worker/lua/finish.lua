#!lua flags=allow-oom
-- End up to 64 requests, each with its last tokens and its one terminal entry; renew the lease.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     worker, lease ms; per request: id, epoch, start, count, token ids packed, text, digest,
--          log probabilities packed, finish reason, why, prompt tokens
-- Returns  per request: OK | FENCED | GAP
-- Twice    the second run finds the record ended under its own epoch: OK. Everybody else who ends
--          a request raises its epoch.

-- @include record

local T, worker = KEYS[1], ARGV[1]
local FIELDS = 11
local now = now_ms()
local verdicts = {}

local function finish(id, epoch, start, last)
  local r = load(T, id)
  if not r or r.epoch ~= epoch or r.worker ~= worker then
    return 'FENCED'
  end
  if r.state == 'end' then
    return 'OK'
  end
  if r.state ~= 'run' then
    return 'FENCED'
  end
  if r.offset ~= start then
    return 'GAP'
  end
  finish_record(T, r, now, last)
  return 'OK'
end

redis.call('ZADD', T .. ':workers', int(now + tonumber(ARGV[2])), worker)
return settling(T, function()
  for i = 3, #ARGV, FIELDS do
    local count = tonumber(ARGV[i + 3])
    verdicts[#verdicts + 1] = finish(ARGV[i], tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2]), {
      count = count, tokens = ARGV[i + 4], text = ARGV[i + 5],
      digest = count > 0 and ARGV[i + 6] or nil, logprobs = ARGV[i + 7],
      finish = ARGV[i + 8], reason = ARGV[i + 9], prompt = tonumber(ARGV[i + 10]),
    })
  end
  return verdicts
end)
