"""`is_about_the_server`: whether a refusal is about the server's state, and passes."""

from redis.exceptions import (
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    RedisError,
    ResponseError,
    TryAgainError,
)

#: Answers about the server, whatever was asked. The rights of a user too are for an operator to
#: mend, and no fault of a request.
_SERVER_ERRORS = (
    ClusterDownError,
    MasterDownError,
    NoPermissionError,
    OutOfMemoryError,
    ReadOnlyError,
    TryAgainError,
)
#: Those that the client library, or an older version of it, has no class for.
_SERVER_CODES = (
    *("MISCONF ", "BUSY ", "NOREPLICAS ", "LOADING "),
    *("CLUSTERDOWN ", "MASTERDOWN ", "TRYAGAIN "),
)
#: Rights that a script lacks: in the words of Valkey and Redis since 7.2, and of Redis before.
_RIGHTS = ("ACL failure in script", "The user executing the script can't")


def is_about_the_server(error: RedisError) -> bool:
    """Whether the same call may succeed later; otherwise what was asked is at fault."""
    if not isinstance(error, ResponseError) or isinstance(error, _SERVER_ERRORS):
        return True
    return str(error).startswith((*_SERVER_CODES, *_RIGHTS))
