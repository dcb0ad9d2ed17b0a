#!lua
-- Enqueue one or many requests: for each the record, its reference, the indexes and a wake.
--
-- KEYS[1]  T, the tag of the shard
-- ARGV     the producer's clock in ms, which the deadlines are made with: this server's counts;
--          per request what `place` takes: id, fingerprint, payload, tenant, priority, deadline ms,
--          prompt tokens, most new tokens, reply stream
-- Returns  per request: OK | DUP (same id, same content: nothing done) | CONFLICT (same id, other
--          content) | BUSY (as many live requests as max_live) | QUOTA (as many of this tenant);
--          and last the retry-after in ms, 0 unless one was BUSY or over QUOTA
-- Twice    the second run finds its own records: DUP

local T = KEYS[1]

-- @include record
-- @include place

skew = now - tonumber(ARGV[1])
return settling(T, function()
  local replies, added, refused = {}, false, false
  for i = 2, #ARGV, FIELDS do
    local verdict = place(i)
    replies[#replies + 1] = verdict
    added = added or verdict == 'OK'
    refused = refused or verdict == 'BUSY' or verdict == 'QUOTA'
  end
  if added then
    wake(T, 'wake')
  end
  replies[#replies + 1] = refused and retry_after_ms() or 0
  return replies
end)
