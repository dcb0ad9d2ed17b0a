"""What goes wrong in the engine, beside a request that is `InvalidRequest`.

TokenmillError
|-- ModelNotFound      no such model here; the text lists what is known and how to get it
|-- UnsupportedModel   the model is here, but its family or a feature of it is not supported
|-- OutOfMemory        the model or its KV cache does not fit the device
`-- GroupLost          a rank of a tensor-parallel group has gone; the others go with it
"""

from tokenmill.producer.errors import TokenmillError


class ModelNotFound(TokenmillError):
    """No model of that name, path or hub id."""


class UnsupportedModel(TokenmillError):
    """The model cannot be run; the text says what is missing and what is supported."""


class OutOfMemory(TokenmillError):
    """The model or its KV cache does not fit the device."""


class GroupLost(TokenmillError):
    """A rank of a tensor-parallel group ended or fell out of step: no step is possible any more."""
