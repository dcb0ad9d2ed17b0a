"""`Tokenizer`: text to token ids and back, and the model's chat template.

Built on the `tokenizers` library alone: importing transformers would cost a second of every start.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken as Added
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from tokenmill.engine.chat_template import ChatTemplate
from tokenmill.engine.errors import UnsupportedModel
from tokenmill.engine.json_file import read_json
from tokenmill.producer.errors import InvalidRequest

# `tokenizer.ggml.token_type` of tokens that text is never split into, and never joined to.
_CONTROL_TOKEN, _USER_TOKEN = 3, 4


class Tokenizer:
    """A backend tokenizer with what a request needs of it."""

    def __init__(
        self,
        backend: Backend,
        *,
        eos_token_ids: Iterable[int],
        chat_template: str | None = None,
        special: Mapping[str, str] | None = None,
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        control = {token_id: token.content for token_id, token in added.items() if token.special}
        self._control_ids = frozenset(control)
        self._template = ChatTemplate(
            chat_template, special=special or {}, control_tokens=control.values()
        )
        self.eos_token_ids = frozenset(eos_token_ids)

    def to_json(self) -> str:
        """The backend as tokenizer.json describes it."""
        return self._backend.to_str()

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, with the special tokens that the model wants around it.

        The text is taken as it is: control tokens written in it are control tokens.
        """
        return self._backend.encode(text, add_special_tokens=True).ids

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._backend.decode(token_ids, skip_special_tokens=True)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        tools: Sequence[Mapping[str, Any]] = (),
    ) -> list[int]:
        """Token ids of a conversation, ending where the assistant is to speak.

        What the messages and tools say is text: control tokens in it stay text.

        Raises:
            InvalidRequest: the model has no template, or the template refuses the messages.
        """
        ids: list[int] = []
        for piece, is_text in self._template.render(messages, tools):
            if is_text:
                ids += self._encode_literally(piece)
            else:
                ids += self._backend.encode(piece, add_special_tokens=False).ids
        return ids

    def _encode_literally(self, text: str) -> list[int]:
        """Token ids of a text in which nothing is a control token."""
        backend = self._backend
        if backend.normalizer is not None:
            text = backend.normalizer.normalize_str(text)
        words = [text]
        if backend.pre_tokenizer is not None:
            words = [word for word, _ in backend.pre_tokenizer.pre_tokenize_str(text)]
        ids = [token.id for word in words for token in backend.model.tokenize(word)]
        if self._control_ids.intersection(ids):
            raise InvalidRequest("prompt", "messages without this model's control tokens", text)
        return ids


def tokenizer_from_directory(directory: Path) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    Raises:
        UnsupportedModel: it has no `tokenizer.json`.
    """
    file = directory / "tokenizer.json"
    if not file.is_file():
        raise UnsupportedModel(
            f"{directory} must hold a tokenizer.json; save the model's fast tokenizer there first"
        )
    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise UnsupportedModel(f"{file} is not a tokenizer: {error}; pull it again") from error
    config = read_json(directory / "tokenizer_config.json")
    template = config.get("chat_template")
    if (directory / "chat_template.jinja").is_file():
        template = (directory / "chat_template.jinja").read_text("utf-8")
    if isinstance(template, list):  # several named ones
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    special = {
        name: value["content"] if isinstance(value, dict) else value
        for name in ("bos_token", "eos_token", "pad_token", "unk_token")
        if (value := config.get(name))
    }
    return Tokenizer(
        backend,
        eos_token_ids=_eos_of(directory, backend, special),
        chat_template=template,
        special=special,
    )


def _eos_of(directory: Path, backend: Backend, special: Mapping[str, str]) -> set[int]:
    """End tokens: generation_config.json knows best, then config.json, then the tokenizer."""
    for name in ("generation_config.json", "config.json"):
        eos = read_json(directory / name).get("eos_token_id")
        if eos is not None:
            return set(eos) if isinstance(eos, list) else {eos}
    eos = backend.token_to_id(special["eos_token"]) if "eos_token" in special else None
    return set() if eos is None else {eos}


def tokenizer_from_gguf(metadata: Mapping[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF file describes.

    Raises:
        UnsupportedModel: another kind of tokenizer, or an unknown way of splitting words.
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise UnsupportedModel(
            f"tokenizer.ggml.model must be 'gpt2' (byte-level BPE), got {kind!r}; "
            "use the safetensors form of this model"
        )
    tokens: list[str] = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(pair.split(" ", 1)) for pair in metadata["tokenizer.ggml.merges"]]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    pre = str(metadata.get("tokenizer.ggml.pre", "default"))
    backend = Backend(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = _pre_tokenizer(pre)
    backend.decoder = decoders.ByteLevel()
    kinds: list[int] = metadata.get("tokenizer.ggml.token_type", [])
    added = [
        Added(token, special=kind == _CONTROL_TOKEN, normalized=False)
        for token, kind in zip(tokens, kinds, strict=False)
        if kind in (_CONTROL_TOKEN, _USER_TOKEN)
    ]
    backend.add_special_tokens([t for t in added if t.special])
    backend.add_tokens([t for t in added if not t.special])
    special = {
        f"{name}_token": tokens[number]
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown"))
        if (number := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None
    }
    eos = {metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    return Tokenizer(
        _with_bos(backend, metadata, special),
        eos_token_ids={number for number in eos if number is not None},
        chat_template=metadata.get("tokenizer.chat_template"),
        special=special,
    )


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    if name in ("gpt-2", "gpt2"):
        return byte_level
    raise UnsupportedModel(
        f"tokenizer.ggml.pre must be smollm or gpt-2, got {name!r}; "
        "use the safetensors form of this model"
    )


def _with_bos(backend: Backend, metadata: Mapping[str, Any], special: Mapping[str, str]) -> Backend:
    if metadata.get("tokenizer.ggml.add_bos_token") and "bos_token" in special:
        from tokenizers.processors import TemplateProcessing

        bos = special["bos_token"]
        backend.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return backend
