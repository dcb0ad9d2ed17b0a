"""Bytes that reach new branches, found by atheris: `python tests/fuzz/guided.py -runs=1000000`.

They go where bytes of strangers are read first: into an entry of the inbox and into a record. Each
must become a request, or an error that names a field. Atheris is not among our dependencies;
install it where this is run.
"""

import sys

import atheris

with atheris.instrument_imports(include=["tokenmill", "json", "msgpack"]):
    import msgpack.fallback

    from tokenmill.producer.errors import InvalidRequest
    from tokenmill.producer.wire import Request
    from tokenmill.worker import plain_inbox


def one(data: bytes) -> None:
    """Read some bytes as each kind of entry."""
    for field in (b"json", b"msgpack"):
        arguments = plain_inbox._admission("1700000000000-0", {field: data}, 0)
        refusal = str(arguments[2])
        if refusal and " must be " not in refusal:
            raise AssertionError(refusal)
    try:
        Request.unpack(data)
    except InvalidRequest as error:
        if not error.field:
            raise


if __name__ == "__main__":
    # In Python its branches are seen.
    msgpack.unpackb = msgpack.fallback.unpackb
    atheris.Setup(sys.argv, one)
    atheris.Fuzz()
