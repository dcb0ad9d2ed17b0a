"""What a worker writes for a claim, made by hand."""

from tokenmill.producer.wire import Usage, chain_digest
from tokenmill.worker.queue import Append, Claim, Finish


def piece(claim: Claim, start: int, *token_ids: int, text: str = "") -> Append:
    """A delta behind the tokens that came with the claim."""
    return Append(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=start,
        token_ids=token_ids,
        text=text,
        digest=chain_digest("", (*claim.token_ids, *token_ids)),
    )


def end(
    claim: Claim,
    start: int,
    *token_ids: int,
    before: tuple[int, ...] = (),
    reason: str = "stop",
    text: str = "",
) -> Finish:
    """An end; `before` are the tokens that were written since the claim."""
    return Finish(
        request_id=claim.request_id,
        epoch=claim.epoch,
        start=start,
        token_ids=token_ids,
        text=text,
        digest=chain_digest("", (*claim.token_ids, *before, *token_ids)),
        finish_reason=reason,
        usage=Usage(prompt_tokens=3, completion_tokens=start + len(token_ids)),
    )
