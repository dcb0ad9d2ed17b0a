"""OpenAI's batch format: what a line's body asks for, and the form of the answers.

A body field that we do not serve is an error of its row, never silently ignored; one that asks for
nothing (n = 1, logprobs = false, ...) is accepted. What a body leaves out has OpenAI's default.
"""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from tokenmill.producer.errors import InvalidRequest
from tokenmill.producer.journal import Answer
from tokenmill.producer.params import SamplingParams

#: Which body field holds the prompt, by url.
PROMPT_FIELDS = {"/v1/completions": "prompt", "/v1/chat/completions": "messages"}
_LINE_FIELDS = ("custom_id", "method", "url", "body")
#: Sampling parameters by the name they have in a body.
_SAMPLING = {item.name: item.name for item in fields(SamplingParams)} | {
    "max_completion_tokens": "max_tokens"
}
#: What a body that says nothing gets, by url: OpenAI's defaults. A chat answer has no limit there
#: but the context; here it has a high one, as what is asked for decides how workers are shared.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "/v1/completions": {"temperature": 1.0, "max_tokens": 16},
    "/v1/chat/completions": {"temperature": 1.0, "max_tokens": 4096},
}
#: Values that ask for nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "stream": (False,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "modalities": (["text"],),
    "service_tier": ("auto", "default"),
}
#: Fields with a place of their own.
_ELSEWHERE = frozenset({"model", "tools", "response_format"})
#: Labels for the sender's own use.
_IGNORED = frozenset({"user", "metadata", "store", "safety_identifier"})


def is_batch_line(columns: Mapping[str, Any]) -> bool:
    """Whether a row looks like a line of this format."""
    return "body" in columns and ("custom_id" in columns or "url" in columns)


def prompt_field(columns: Mapping[str, Any]) -> str:
    """Check the frame of a line and return the body field that holds its prompt.

    Raises:
        InvalidRequest: a field is missing, unknown or wrong.
    """
    for name in columns:
        if name not in _LINE_FIELDS:
            raise InvalidRequest(name, f"one of {', '.join(_LINE_FIELDS)}", name, "remove it")
    if not isinstance(columns.get("custom_id"), str):
        raise InvalidRequest("custom_id", "a string", columns.get("custom_id"))
    if columns.get("method") != "POST":
        raise InvalidRequest("method", "POST", columns.get("method"))
    url = columns.get("url")
    if not isinstance(url, str) or url not in PROMPT_FIELDS:
        raise InvalidRequest("url", " or ".join(PROMPT_FIELDS), url)
    if not isinstance(columns.get("body"), dict):
        raise InvalidRequest("body", "an object", columns.get("body"))
    return PROMPT_FIELDS[url]


def sampling(body: Mapping[str, Any], prompt: str) -> dict[str, Any]:
    """The sampling parameters a body sets; `prompt` is the name of its prompt field.

    Raises:
        InvalidRequest: a field that is unknown, or asks for what is not served.
    """
    found: dict[str, Any] = {}
    for name, value in body.items():
        if value is None or name in _IGNORED or name in _ELSEWHERE or name == prompt:
            continue
        if name in _SAMPLING and name not in _NEUTRAL:
            found[_SAMPLING[name]] = value
        elif name not in _NEUTRAL:
            raise InvalidRequest(f"body.{name}", "a supported field", value, "remove it")
        elif not any(value == item and type(value) is type(item) for item in _NEUTRAL[name]):
            raise InvalidRequest(f"body.{name}", f"{_NEUTRAL[name][0]!r}, if given", value)
    return found | _response_format(body.get("response_format"))


def defaults(columns: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters of a line that says nothing: those of OpenAI, not ours."""
    return _DEFAULTS[columns["url"]]


def tools_of(body: Mapping[str, Any]) -> Any:
    """The tools that the model is told of."""
    return () if body.get("tool_choice") == "none" else body.get("tools") or ()


def _response_format(value: Any) -> dict[str, Any]:
    if value is None:
        return {}
    kind = value.get("type") if isinstance(value, dict) else None
    if kind == "text":
        return {}
    if kind == "json_object":
        return {"json_schema": {"type": "object"}}
    if kind != "json_schema":
        expected = "an object whose type is text, json_object or json_schema"
        raise InvalidRequest("body.response_format", expected, value)
    inner = value.get("json_schema")
    schema = inner.get("schema") if isinstance(inner, dict) else None
    if not isinstance(schema, dict):
        raise InvalidRequest("body.response_format.json_schema.schema", "an object", schema)
    return {"json_schema": schema}


def names(body: Mapping[str, Any], prompt: str) -> dict[str, str]:
    """Where our fields stand in the line, for errors: field -> path."""
    paths = {ours: f"body.{theirs}" for theirs, ours in _SAMPLING.items() if theirs in body}
    return paths | {
        "prompt": f"body.{prompt}",
        "model": "body.model",
        "tools": "body.tools",
        "json_schema": "body.response_format",
    }


def prompt_of(body: Mapping[str, Any], prompt: str) -> Any:
    """The prompt: text, token ids, or messages whose text parts are joined.

    Raises:
        InvalidRequest: it is missing, or holds what is not text.
    """
    value = body.get(prompt)
    if value is None:
        raise InvalidRequest(f"body.{prompt}", "given", None)
    if prompt == "prompt":
        one = isinstance(value, list) and len(value) == 1 and isinstance(value[0], str | list)
        return value[0] if one else value
    if not isinstance(value, list) or not value:
        raise InvalidRequest("body.messages", "a list of messages, not empty", value)
    return [_message(item, f"body.messages[{index}]") for index, item in enumerate(value)]


def output_row(columns: Mapping[str, Any], answer: Answer, run: str, model: str) -> dict[str, Any]:
    """A line of the output file."""
    name = f"{run}-{answer.row}"
    row = {"id": f"batch_req_{name}", "custom_id": columns.get("custom_id")}
    if not answer.ok:
        code = "invalid_request" if answer.field else answer.finish_reason
        error = {"code": code, "message": answer.reason, "param": answer.field or None}
        return row | {"response": None, "error": error | {"line": answer.line}}
    body = _chat(answer) if columns["url"] == "/v1/chat/completions" else _completion(answer)
    usage = {
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": answer.prompt_tokens + answer.completion_tokens,
    }
    body |= {"id": f"{body['id']}-{name}", "created": answer.ended_s, "model": model}
    response = {"status_code": 200, "request_id": name, "body": body | {"usage": usage}}
    return row | {"response": response, "error": None}


def _chat(answer: Answer) -> dict[str, Any]:
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": answer.text},
        "logprobs": None,
        "finish_reason": answer.finish_reason,
    }
    return {"id": "chatcmpl", "object": "chat.completion", "choices": [choice]}


def _completion(answer: Answer) -> dict[str, Any]:
    choice = {
        "index": 0,
        "text": answer.text,
        "logprobs": None,
        "finish_reason": answer.finish_reason,
    }
    return {"id": "cmpl", "object": "text_completion", "choices": [choice]}


def _message(item: Any, path: str) -> Any:
    if not isinstance(item, dict) or not isinstance(item.get("content"), list):
        return item
    texts = []
    for index, part in enumerate(item["content"]):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            raise InvalidRequest(f"{path}.content[{index}].type", "text", kind)
        texts.append(part["text"])
    return item | {"content": "\n".join(texts)}
