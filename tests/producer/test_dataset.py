import json
from pathlib import Path
from typing import Any

import pytest

from tokenmill.producer.dataset import (
    MAX_LINE_BYTES,
    BadRow,
    Dataset,
    InputError,
    Layout,
    Reading,
    Row,
)
from tokenmill.producer.journal import Answer


def rows_of(tmp_path: Path, *lines: Any, **reading: Any) -> list[Row | BadRow]:
    return list(dataset_of(tmp_path, *lines, **reading))


def dataset_of(tmp_path: Path, *lines: Any, **reading: Any) -> Dataset:
    path = tmp_path / "input.jsonl"
    encoded = [line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines]
    path.write_bytes(b"\n".join(encoded) + b"\n")
    return Dataset(path, Reading(**reading))


def bad(row: Row | BadRow) -> BadRow:
    assert isinstance(row, BadRow)
    return row


def good(row: Row | BadRow) -> Row:
    assert isinstance(row, Row), row
    return row


def batch_line(**body: Any) -> dict[str, Any]:
    body = {"messages": [{"role": "user", "content": "hi"}], **body}
    return {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}


def answer(row: int = 0, **fields: Any) -> Answer:
    values: dict[str, Any] = {"row": row, "line": row + 1, "text": "A", "finish_reason": "stop"}
    return Answer(**values | fields)


def test_plain_text_becomes_a_chat_message(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, {"prompt": "hi", "topic": "x"})
    assert good(row).prompt == [{"role": "user", "content": "hi"}]
    assert good(row).columns == {"prompt": "hi", "topic": "x"}


def test_raw_text_is_sent_as_it_is(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, {"text": "hi"}, raw=True, prompt_field="text")
    assert good(row).prompt == "hi"


def test_messages_column_is_found(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    (row,) = rows_of(tmp_path, {"messages": messages})
    assert good(row).prompt == messages


def test_row_sampling_overrides_the_flags(tmp_path: Path) -> None:
    sampling = {"max_tokens": 5, "temperature": 0.5}
    rows = rows_of(tmp_path, {"prompt": "a", "max_tokens": 9}, {"prompt": "b"}, sampling=sampling)
    assert [good(row).params.max_tokens for row in rows] == [9, 5]
    assert [good(row).params.temperature for row in rows] == [0.5, 0.5]


def test_a_null_column_says_nothing(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, {"prompt": "a", "max_tokens": None}, sampling={"max_tokens": 7})
    assert good(row).params.max_tokens == 7


def test_bad_lines_have_their_number_and_the_others_go_on(tmp_path: Path) -> None:
    rows = rows_of(
        tmp_path,
        {"prompt": "a"},
        b"",
        b"{broken",
        b"[1]",
        b"\xff\xfe",
        b'{"prompt": NaN}',
        {"x": 1},
    )
    assert isinstance(rows[0], Row)
    assert [(bad(row).index, bad(row).line) for row in rows[1:]] == [
        (1, 3),
        (2, 4),
        (3, 5),
        (4, 6),
        (5, 7),
    ]
    assert "line must be JSON, got bytes of length 8" in bad(rows[1]).message
    assert "--prompt-field" in bad(rows[5]).message
    assert bad(rows[5]).columns == {"x": 1}


def test_a_deeply_nested_line_is_a_bad_row(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, b'{"prompt": ' + b"[" * 100_000 + b"}")
    assert bad(row).field == "line"


def test_an_endless_line_is_a_bad_row(tmp_path: Path) -> None:
    long = b'{"prompt": "' + b"x" * MAX_LINE_BYTES + b'"}'
    rows = rows_of(tmp_path, long, {"prompt": "a"})
    assert "bytes long" in bad(rows[0]).message
    assert good(rows[1]).line == 2


def test_sampling_errors_name_the_field(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, {"prompt": "a", "max_tokens": 0})
    assert bad(row).field == "max_tokens"
    assert bad(row).message.startswith("max_tokens must be an integer from 1")


def test_a_column_that_would_be_overwritten_is_refused(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, {"prompt": "a", "answer": 1})
    assert "--answer-field" in bad(rows[0]).message
    rows = rows_of(tmp_path, {"prompt": "a", "answer": 1, "usage": 2}, answer_field="second")
    assert isinstance(rows[0], Row)


def test_byte_order_mark_and_crlf(tmp_path: Path) -> None:
    rows = rows_of(tmp_path, b'\xef\xbb\xbf{"prompt": "a"}\r', b'{"prompt": "b"}\r')
    assert [good(row).line for row in rows] == [1, 2]


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"", "is empty"), (b"\n \n", "is empty"), (b'[{"prompt": "a"}]', "begins with an array")],
)
def test_files_of_another_format(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "input.jsonl"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message):
        Dataset(path, Reading())


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="No such file"):
        Dataset(tmp_path / "none.jsonl", Reading())


def test_survey_counts_rows_and_tells_files_apart(tmp_path: Path) -> None:
    first = dataset_of(tmp_path, {"prompt": "a"}, b"", {"prompt": "b"}).survey
    other = dataset_of(tmp_path, {"prompt": "a"}, b"", {"prompt": "c"}).survey
    assert (first.rows, first.layout) == (2, Layout.PLAIN)
    assert first.digest != other.digest


def test_openai_lines(tmp_path: Path) -> None:
    line = batch_line(max_completion_tokens=7, stop="END", model="m", n=1, user="me")
    dataset = dataset_of(tmp_path, line)
    (row,) = dataset
    assert dataset.layout is Layout.OPENAI
    assert dataset.survey.model == good(row).model == "m"
    assert good(row).params.max_tokens == 7
    assert good(row).params.stop == ("END",)


def test_openai_defaults_are_those_of_openai(tmp_path: Path) -> None:
    """temperature 1, not 0; what the command line says comes between the two."""
    line = {"custom_id": "c", "method": "POST", "url": "/v1/completions", "body": {"prompt": "t"}}
    (chat,) = rows_of(tmp_path, batch_line())
    (text,) = rows_of(tmp_path, line)
    (flags,) = rows_of(tmp_path, batch_line(top_p=0.5), sampling={"temperature": 0.3, "top_p": 0.1})
    assert (good(chat).params.temperature, good(chat).params.top_p) == (1.0, 1.0)
    assert (good(chat).params.max_tokens, good(text).params.max_tokens) == (4096, 16)
    assert (good(flags).params.temperature, good(flags).params.top_p) == (0.3, 0.5)


def test_openai_sampling_fields(tmp_path: Path) -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    given = {
        "presence_penalty": -0.5,
        "frequency_penalty": 1,
        "logit_bias": {"7": -100},
        "seed": 3,
        "stop": ["a", "b"],
        "tools": [tool],
        "tool_choice": "auto",
        "logprobs": False,
        "n": None,
    }
    (row,) = rows_of(tmp_path, batch_line(**given))
    params = good(row).params
    assert (params.presence_penalty, params.frequency_penalty) == (-0.5, 1)
    assert (params.logit_bias, params.seed, params.stop) == ({7: -100.0}, 3, ("a", "b"))
    assert good(row).tools == [tool]
    (row,) = rows_of(tmp_path, batch_line(tools=[tool], tool_choice="none"))
    assert not good(row).tools


def test_openai_response_format(tmp_path: Path) -> None:
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    formats: list[dict[str, Any]] = [
        {"type": "text"},
        {"type": "json_object"},
        {"type": "json_schema", "json_schema": {"name": "x", "strict": True, "schema": schema}},
    ]
    rows = [rows_of(tmp_path, batch_line(response_format=item))[0] for item in formats]
    got = [good(row).params.json_schema for row in rows]
    assert got == [None, '{"type": "object"}', json.dumps(schema)]


def test_a_custom_id_is_given_once(tmp_path: Path) -> None:
    lines = [batch_line() | {"custom_id": name} for name in ("a", "b", "a", "c")]
    rows = rows_of(tmp_path, *lines)
    assert [isinstance(row, Row) for row in rows] == [True, True, False, True]
    assert bad(rows[2]).message == "custom_id must be another than those before, got 'a'"


def test_tools_of_plain_rows_come_with_messages(tmp_path: Path) -> None:
    tool = {"function": {"name": "f"}}
    messages = [{"role": "user", "content": "u"}]
    rows = rows_of(
        tmp_path, {"messages": messages, "tools": [tool]}, {"prompt": "a", "tools": "hammer"}
    )
    assert [good(row).tools for row in rows] == [[tool], ()]


def test_log_probabilities_are_refused_where_nobody_writes_them(tmp_path: Path) -> None:
    (row,) = rows_of(tmp_path, {"prompt": "a", "logprobs": 2})
    assert bad(row).field == "logprobs"


def test_openai_text_parts_are_joined(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    (row,) = rows_of(tmp_path, batch_line(messages=[{"role": "user", "content": parts}]))
    assert good(row).prompt == [{"role": "user", "content": "a\nb"}]


def test_openai_completions(tmp_path: Path) -> None:
    line = {"method": "POST", "url": "/v1/completions"}
    prompts = ("t", ["t"], [1, 2])
    lines = [{**line, "custom_id": str(p), "body": {"prompt": p}} for p in prompts]
    rows = rows_of(tmp_path, *lines)
    assert [good(row).prompt for row in rows] == ["t", "t", [1, 2]]


@pytest.mark.parametrize(
    ("line", "field"),
    [
        (batch_line(n=2), "body.n"),
        (batch_line(frequency_penalty=5), "body.frequency_penalty"),
        (batch_line(made_up=1), "body.made_up"),
        (batch_line(logprobs=True), "body.logprobs"),
        (batch_line(top_logprobs=3), "body.top_logprobs"),
        (batch_line(presence_penalty="x"), "body.presence_penalty"),
        (batch_line(logit_bias={"5": 500}), "body.logit_bias.5"),
        (batch_line(seed=-1), "body.seed"),
        (batch_line(tool_choice="required"), "body.tool_choice"),
        (batch_line(response_format={"type": "grammar"}), "body.response_format"),
        (batch_line(response_format="json"), "body.response_format"),
        (
            batch_line(response_format={"type": "json_schema", "json_schema": {"name": "x"}}),
            "body.response_format.json_schema.schema",
        ),
        (batch_line(max_tokens=0), "body.max_tokens"),
        (batch_line(max_completion_tokens="x"), "body.max_completion_tokens"),
        (batch_line(stream=True), "body.stream"),
        (batch_line(messages=[]), "body.messages"),
        (
            batch_line(messages=[{"role": "user", "content": [{"type": "image_url"}]}]),
            "body.messages[0].content[0].type",
        ),
        (batch_line() | {"method": "GET"}, "method"),
        (batch_line() | {"url": "/v1/embeddings"}, "url"),
        (batch_line() | {"custom_id": 5}, "custom_id"),
        (batch_line() | {"extra": 5}, "extra"),
        (batch_line() | {"body": "x"}, "body"),
    ],
)
def test_openai_errors_name_the_field(tmp_path: Path, line: dict[str, Any], field: str) -> None:
    (row,) = rows_of(tmp_path, line)
    assert bad(row).field == field
    assert bad(row).message.startswith(field)


def test_plain_output_keeps_the_columns(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"prompt": "a", "id": 7})
    (row,) = dataset
    written = dataset.output_row(
        row, answer(prompt_tokens=3, completion_tokens=1), run="r", model="m"
    )
    assert written == {
        "prompt": "a",
        "id": 7,
        "answer": "A",
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 3, "completion_tokens": 1},
    }


def test_plain_output_of_a_bad_row(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, {"id": 7}, answer_field="second")
    (row,) = dataset
    failed = answer(text="", finish_reason="error", reason="why", field="prompt")
    written = dataset.output_row(row, failed, run="r", model="m")
    assert written["second"] is None
    assert written["second_error"] == {"message": "why", "line": 1, "field": "prompt"}
    assert written["id"] == 7


def test_openai_output(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, batch_line())
    (row,) = dataset
    done = answer(prompt_tokens=3, completion_tokens=1, ended_s=99)
    written = dataset.output_row(row, done, run="r", model="m")
    body = written["response"]["body"]
    assert written["custom_id"] == "a"
    assert written["error"] is None
    assert written["response"]["status_code"] == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "m"
    assert body["choices"][0]["message"] == {"role": "assistant", "content": "A"}
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}


def test_openai_error_form(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path, batch_line(n=2), b"{broken")
    failed = [
        answer(n, text="", finish_reason="error", reason="why", field="body.n") for n in (0, 1)
    ]
    written = [
        dataset.output_row(row, item, run="r", model="m")
        for row, item in zip(dataset, failed, strict=True)
    ]
    assert written[0]["response"] is None
    assert written[0]["error"]["code"] == "invalid_request"
    assert written[0]["error"]["param"] == "body.n"
    assert written[1]["custom_id"] is None
    assert written[1]["error"]["line"] == 2
