"""Text to token ids and back, from what a GGUF file says about its vocabulary."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as BaseTokenizer
from tokenizers.decoders import DecodeStream

from reference_llm.errors import CheckpointError
from reference_llm.gguf_file import GgufFile

_CONTROL, _USER_DEFINED = 3, 4  # values of tokenizer.ggml.token_type
_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _gpt_2() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def _smollm() -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _gpt_2()])


def _llama_3() -> Any:
    split = pre_tokenizers.Split(Regex(_LLAMA_3), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# How text is cut into words before merging, by the file's name for it.
_WORDS: dict[str, Callable[[], Any]] = {"gpt-2": _gpt_2, "smollm": _smollm, "llama-bpe": _llama_3}


class Tokenizer:
    """The byte-level BPE of a GGUF file, and its chat template.

    Attributes:
        stop_tokens: ids that end an answer.

    Raises:
        CheckpointError: for a kind of vocabulary that is not supported, or one with parts missing.
    """

    def __init__(self, file: GgufFile) -> None:
        metadata = file.metadata
        kind = (metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre"))
        if kind[0] != "gpt2" or kind[1] not in _WORDS:
            problem = f"has a tokenizer of model {kind[0]!r} with pre-tokenizer {kind[1]!r}"
            raise CheckpointError(file.path, problem, f"'gpt2' with one of {sorted(_WORDS)} is supported")
        try:
            tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
            merges: Sequence[str] = metadata["tokenizer.ggml.merges"]
            kinds: Sequence[int] = metadata["tokenizer.ggml.token_type"]
        except KeyError as error:
            raise CheckpointError(file.path, f"has no {error.args[0]}", "convert it again with llama.cpp") from None
        pairs = [tuple(merge.split(" ", 1)) for merge in merges]
        vocabulary = {token: index for index, token in enumerate(tokens)}
        self._base = BaseTokenizer(models.BPE(vocabulary, pairs, ignore_merges=kind[1] == "llama-bpe"))  # type: ignore[arg-type] # pairs
        self._base.pre_tokenizer = _WORDS[kind[1]]()
        self._base.decoder = decoders.ByteLevel()
        special = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _CONTROL]
        self._base.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
        defined = [token for token, kind in zip(tokens, kinds, strict=True) if kind == _USER_DEFINED]
        self._base.add_tokens([AddedToken(token, normalized=False) for token in defined])
        ends = (metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
        self.stop_tokens = frozenset(int(end) for end in ends if end is not None)
        self._chat = _ChatTemplate(file)

    def encode(self, text: str) -> list[int]:
        """The ids of ``text``; special tokens in it count as such. Nothing is added."""
        return list(self._base.encode(text, add_special_tokens=False).ids)

    def encode_question(self, question: str) -> list[int]:
        """The ids of a chat in which the user has asked ``question`` and the model is to answer."""
        return self.encode(self._chat.render(question))

    def decode(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, without special ones."""
        return str(self._base.decode(list(tokens), skip_special_tokens=True))

    def stream(self) -> TextStream:
        """A stream that turns the tokens of one answer into text as they come."""
        return TextStream(self._base)


class TextStream:
    """One answer as it grows. A character whose bytes are spread over several tokens comes with the last of them."""

    def __init__(self, base: BaseTokenizer) -> None:
        self._base = base
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """What ``token`` adds to the text: empty while a character is incomplete."""
        return self._stream.step(self._base, token) or ""


class _ChatTemplate:
    """The file's own Jinja template, in a sandbox: it comes from whoever made the file."""

    def __init__(self, file: GgufFile) -> None:
        self._path = file.path
        metadata = file.metadata
        tokens: Sequence[str] = metadata["tokenizer.ggml.tokens"]
        self._special = {}
        for name in ("bos", "eos"):
            index = metadata.get(f"tokenizer.ggml.{name}_token_id")
            self._special[f"{name}_token"] = "" if index is None else tokens[index]
        # Without a template the question is simply continued.
        source = metadata.get("tokenizer.chat_template", "{{ bos_token }}{{ messages[0]['content'] }}")
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _raise
        try:
            self._template = environment.from_string(source)
        except TemplateError as error:
            raise self._error(error) from error

    def render(self, question: str) -> str:
        messages = [{"role": "user", "content": question}]
        try:
            return self._template.render(messages=messages, add_generation_prompt=True, **self._special)
        except TemplateError as error:
            raise self._error(error) from error

    def _error(self, error: TemplateError) -> CheckpointError:
        return CheckpointError(self._path, f"has a chat template that fails ({error})", "use another file")


def _raise(message: str) -> str:
    raise TemplateError(message)
