"""What is told of a constraint that failed: one of a few phrases of our own.

llguidance quotes what it met, and a schema, a regex or a choice is a user's text, which must not
come into errors, dead letters and logs. The phrase is chosen by how the library's message begins,
and only names of JSON schema's own keywords are taken from it.
"""

import re

_KEYWORDS = frozenset(
    [
        "contains",
        "dependencies",
        "dependentRequired",
        "dependentSchemas",
        "else",
        "if",
        "maxContains",
        "maxProperties",
        "minContains",
        "minProperties",
        "not",
        "oneOf",
        "propertyNames",
        "then",
        "unevaluatedItems",
        "unevaluatedProperties",
        "uniqueItems",
    ]
)
#: Before the message itself: a position in a grammar, or the part that failed.
_PREFIX = re.compile(r"(?:at \d+\(\d+\): |(?:lexer|parser) error: )*", re.IGNORECASE)

_PHRASES = tuple(
    (re.compile(begin, re.IGNORECASE), phrase)
    for begin, phrase in {
        r"too many|initial lexer|grammar size|schema too large|current row|.{0,40}fuel exhausted": (
            "one that is too large or too costly"
        ),
        r"invalid regex|regex parse error": "an invalid or unsupported regular expression",
        r"unknown format": "an unsupported format",
        r"resource |pointer ": "a reference that leads nowhere in the schema",
        r"unsatisfiable schema|noextensionbias": "one that no text satisfies",
        r"token .{0,200} doesn't satisfy": "an output that does not follow it",
        r"invalid type|invalid multiple|expected |.{0,60} must be an? |schema must ": (
            "an invalid JSON schema"
        ),
    }.items()
)


def described(message: str) -> str:
    """A phrase for llguidance's message, "" for none; nothing of the message itself."""
    if not message:
        return ""
    text = message[_PREFIX.match(message).end() :]  # type: ignore[union-attr]
    if text.startswith("oneOf constraints"):
        return "unsupported keywords oneOf"
    if text.startswith("Unimplemented keys"):
        line = text.partition("\n")[0]
        named = sorted(_KEYWORDS.intersection(re.findall(r"[A-Za-z]+", line)))
        return " ".join(["unsupported keywords", *named])
    for begin, phrase in _PHRASES:
        if begin.match(text):
            return phrase
    return "one that is not supported"
