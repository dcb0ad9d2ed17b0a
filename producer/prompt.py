"""`Prompt`: what an answer follows, text, token ids or the messages of a chat, and its bounds."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenmill.producer.errors import InvalidRequest

MAX_PROMPT_TOKENS = 1_000_000
MAX_TOKEN_ID = 2**31 - 1
MAX_MESSAGES = 4096
#: Characters of a text, or of one message: no more than a whole request has bytes.
MAX_TEXT = 4 * 2**20

_ROLE = re.compile(r"[a-z][a-z_]{0,31}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat; the worker's model brings the template that joins the turns."""

    role: str
    content: str


#: Text as it is, token ids, or chat messages.
Prompt = str | tuple[int, ...] | tuple[Message, ...]


def check_prompt(value: object) -> Prompt:
    """The value as a prompt; lists become tuples, maps become messages.

    Raises:
        InvalidRequest: it is none, or out of bounds.
    """
    if isinstance(value, str):
        return _text("prompt", value)
    if not isinstance(value, list | tuple) or not value:
        raise InvalidRequest("prompt", "text, token ids or chat messages, not empty", value)
    if _is_int(value[0]):
        return _token_ids(value)
    if len(value) > MAX_MESSAGES:
        raise InvalidRequest("prompt", f"at most {MAX_MESSAGES} messages", len(value))
    return tuple(_message(f"prompt[{index}]", item) for index, item in enumerate(value))


def _text(path: str, value: str) -> str:
    if not 1 <= len(value) <= MAX_TEXT:
        raise InvalidRequest(path, f"1 to {MAX_TEXT} characters", len(value))
    return value


def _token_ids(value: list[Any] | tuple[Any, ...]) -> tuple[int, ...]:
    if len(value) > MAX_PROMPT_TOKENS:
        raise InvalidRequest("prompt", f"at most {MAX_PROMPT_TOKENS} token ids", len(value))
    if set(map(type, value)) == {int} and min(value) >= 0 and max(value) <= MAX_TOKEN_ID:
        return tuple(value)
    for index, item in enumerate(value):  # which one it is, or integers of another type
        if not _is_int(item) or not 0 <= item <= MAX_TOKEN_ID:
            expected = f"a token id from 0 to {MAX_TOKEN_ID}"
            raise InvalidRequest(f"prompt[{index}]", expected, item)
    return tuple(value)


def _message(path: str, item: object) -> Message:
    if isinstance(item, Message):
        role, content = item.role, item.content
    elif isinstance(item, Mapping):
        for name in item:
            if name not in ("role", "content"):
                raise InvalidRequest(f"{path}.{name}", "role or content", name, "remove it")
        role, content = item.get("role", ""), item.get("content", None)
    else:
        raise InvalidRequest(path, "a message with role and content", item)
    if not isinstance(role, str) or not _ROLE.fullmatch(role):
        raise InvalidRequest(f"{path}.role", "a role such as system, user or assistant", role)
    if not isinstance(content, str):
        raise InvalidRequest(f"{path}.content", "text", content)
    if len(content) > MAX_TEXT:
        expected = f"at most {MAX_TEXT} characters"
        raise InvalidRequest(f"{path}.content", expected, len(content))
    return Message(role=role, content=content)


def plain_prompt(prompt: Prompt) -> str | list[Any]:
    """Plain types; undone by `check_prompt`."""
    if isinstance(prompt, str):
        return prompt
    if not isinstance(prompt[0], Message):
        return list(prompt)
    return [
        {"role": item.role, "content": item.content} for item in prompt if isinstance(item, Message)
    ]


def is_chat(prompt: Prompt) -> bool:
    """Whether it is the messages of a chat."""
    return not isinstance(prompt, str) and isinstance(prompt[0], Message)


def prompt_cost(prompt: Prompt) -> int:
    """Its tokens: exact for token ids, else an estimate (4 bytes a token)."""
    if isinstance(prompt, str):
        return _utf8_len(prompt) // 4 + 1
    if not isinstance(prompt[0], Message):
        return len(prompt)
    return sum(_utf8_len(item.content) // 4 + 8 for item in prompt if isinstance(item, Message))


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _utf8_len(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
