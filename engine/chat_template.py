"""`ChatTemplate`: messages and tools to the text that a model was trained on.

Templates come with the model and are Jinja, run in a sandbox, with what Hugging Face gives them
besides: `raise_exception`, `strftime_now`, a `tojson` that escapes no HTML, `{% generation %}`.

Text that users bring may hold the model's control tokens, such as `<|im_end|>`, and must not become
them: it is marked before rendering, so that the tokenizer can tell it from the template's own.
"""

import datetime as dt
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import jinja2
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenmill.producer.errors import InvalidRequest, Words

#: Private-use characters around a control token in a user's text; dropped where users bring them.
_BEGIN, _END = "\uf5a1", "\uf5a2"


class _Generation(Extension):
    """Where an answer stands, for training; here its content is all that matters."""

    tags = {"generation"}  # noqa: RUF012 - the interface of jinja2

    def parse(self, parser: Parser) -> Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: jinja2.runtime.Macro) -> str:
        return str(caller())


class ChatTemplate:
    """A model's template; one that is missing or cannot be read refuses messages, not texts."""

    def __init__(
        self,
        source: str | None,
        *,
        special: Mapping[str, str],
        control_tokens: Iterable[str],
    ) -> None:
        """`special` are variables such as `bos_token`."""
        self._special = dict(special)
        ordered = sorted(filter(None, control_tokens), key=len, reverse=True)
        control = "|".join(map(re.escape, ordered)) or "(?!)"
        self._control = re.compile(control)
        self._marked = re.compile(f"{_BEGIN}({control}){_END}|[{_BEGIN}{_END}]")
        self._error = "this model has no chat template"
        self._template: jinja2.Template | None = None
        self._takes_tools = False
        environment = _environment()
        try:
            if source:
                self._template = environment.from_string(source)
                self._takes_tools = "tools" in find_undeclared_variables(environment.parse(source))
        except jinja2.TemplateError as error:
            self._error = f"this model's chat template cannot be read ({error})"

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> Iterator[tuple[str, bool]]:
        """Pieces of the conversation's text, up to where the assistant is to speak.

        Each with whether it is what a user wrote and must be no control token.

        Raises:
            InvalidRequest: the model has no template, or the template refuses the messages, or
                takes no tools.
        """
        if self._template is None:
            got = Words("messages")
            raise InvalidRequest("prompt", f"a text or token ids, as {self._error}", got)
        if tools and not self._takes_tools:
            expected = "not given, as this model's chat template takes none"
            raise InvalidRequest("tools", expected, tools, "remove them")
        try:
            text = self._template.render(
                messages=self._guarded(list(messages)),
                tools=self._guarded(list(tools)) or None,
                documents=None,
                add_generation_prompt=True,
                **self._special,
            )
        except (jinja2.TemplateError, TypeError, ValueError, LookupError) as error:
            # What the template itself refuses it says in its own words.
            is_its_own = isinstance(error, jinja2.TemplateError)
            told = str(error) if is_its_own else type(error).__name__
            expected = "messages that the model's chat template takes"
            raise InvalidRequest("prompt", expected, Words(told)) from error
        pieces = self._marked.split(text)
        return ((p, bool(n % 2)) for n, p in enumerate(pieces) if p)

    def _guarded(self, value: Any) -> Any:
        """The value with every control token in its texts marked."""
        if isinstance(value, str):
            plain = value.replace(_BEGIN, "").replace(_END, "")
            return self._control.sub(rf"{_BEGIN}\g<0>{_END}", plain)
        if isinstance(value, Mapping):
            return {self._guarded(key): self._guarded(item) for key, item in value.items()}
        return [self._guarded(item) for item in value] if isinstance(value, list) else value


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=["jinja2.ext.loopcontrols", _Generation],
    )

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def as_json(value: object, indent: int | None = None, **options: Any) -> str:
        return json.dumps(value, **{"ensure_ascii": False, "indent": indent} | options)

    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: dt.datetime.now().strftime(form)  # noqa: DTZ005
    environment.filters["tojson"] = as_json
    return environment
