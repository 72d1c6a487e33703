"""Token ids are those of transformers, and text comes back as it went in."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from reference_llm.errors import CheckpointError
from reference_llm.gguf_file import GgufFile, read_gguf
from reference_llm.tokenizer import Tokenizer

TEXTS = (
    "What is the capital of France?",
    "Hello 12345 it's two\n\n spaces <|im_start|>x<|im_end|>",
    "na\u00efve caf\u00e9 \u65e5\u672c\u8a9e \U0001f600\U0001f44d\U0001f3fd \u200d zero",
    "def f(x):\n\treturn x**2  # 3.14\n\n\n",
    "1 22 333 4444, 2024-05-17!",
    " leading and trailing  ",
    "I'll we've they're DON'T",
    "",
)


@pytest.fixture(scope="module")
def tokenizer(model: str) -> Tokenizer:
    """The tokenizer of the real model."""
    return Tokenizer(read_gguf(model))


def test_ids_are_those_of_transformers(tokenizer: Tokenizer, model: str) -> None:
    """For words, digits, code, other scripts, emoji and special tokens, and for a whole chat."""
    path = Path(model)
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    assert [theirs(text)["input_ids"] for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    chat = [{"role": "user", "content": TEXTS[0]}]
    asked = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert theirs(asked)["input_ids"] == tokenizer.encode_question(TEXTS[0])


def test_each_digit_is_a_token(tokenizer: Tokenizer) -> None:
    """Also after several spaces, where llama.cpp and the model's authors cut, and transformers' conversion does not."""
    assert ["x", "  ", "1", "2"] == [tokenizer.decode([token]) for token in tokenizer.encode("x  12")]


def test_streamed_text_is_the_decoded_text(tokenizer: Tokenizer) -> None:
    """No piece is half a character, and together they are the text."""
    for text in TEXTS:
        tokens = tokenizer.encode(text)
        stream = tokenizer.stream()
        pieces = [stream.add(token) for token in tokens]
        assert tokenizer.decode(tokens) == "".join(pieces)
        assert not any("\ufffd" in piece for piece in pieces)


def test_the_answer_ends_with_the_chat_s_own_token(tokenizer: Tokenizer) -> None:
    """``<|im_end|>`` is what the model says when it is done."""
    assert tokenizer.stop_tokens == frozenset(tokenizer.encode("<|im_end|>"))


def test_llama_3_words_keep_three_digits_together(tiny_model: str) -> None:
    """A word takes the character before it along, and digits come in threes."""
    file = read_gguf(tiny_model)
    words = {"tokenizer.ggml.tokens": [*file.metadata["tokenizer.ggml.tokens"], "123", "(he"]}
    metadata = dict(file.metadata) | words | {"tokenizer.ggml.pre": "llama-bpe", "tokenizer.ggml.token_type": [1] * 260}
    llama_3 = Tokenizer(GgufFile(file.path, metadata, file.tensors))
    assert ["123", "4", "(he"] == [llama_3.decode([token]) for token in llama_3.encode("1234(he")]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"tokenizer.ggml.model": "llama"}, "has a tokenizer of model 'llama'"),
        ({"tokenizer.ggml.pre": "elvish"}, "with pre-tokenizer 'elvish'"),
        ({"tokenizer.chat_template": "{% if %}"}, "has a chat template that fails"),
        ({"tokenizer.chat_template": "{{ raise_exception('no system prompt') }}"}, "no system prompt"),
        ({"tokenizer.chat_template": "{{ ''.__class__.__mro__ }}"}, "has a chat template that fails"),
    ],
)
def test_what_cannot_be_used_is_an_error(change: dict[str, str], problem: str, tiny_model: str) -> None:
    """Other kinds of vocabulary, and templates that are wrong or reach for what is not theirs."""
    file = read_gguf(tiny_model)
    with pytest.raises(CheckpointError, match=problem):
        Tokenizer(GgufFile(file.path, dict(file.metadata) | change, file.tensors)).encode_question("hi")
