"""The chat template byte for byte, and the tokenizer around it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers
from support import tiny

from zimage_ref.errors import FormatError
from zimage_ref.model.tokenizer import MAX_TOKENS, Tokenizer, render


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def test_the_template_is_one_user_message_and_the_assistants_header() -> None:
    assert render("a fox\nin {snow}") == ("<|im_start|>user\na fox\nin {snow}<|im_end|>\n<|im_start|>assistant\n")


def test_ids_spell_the_rendered_prompt_with_chat_tokens_as_single_ids(path: Path) -> None:
    ids = Tokenizer(path).encode("a red fox, 狐")
    library = tokenizers.Tokenizer.from_file(str(path))
    assert ids.dtype == np.int32
    assert library.decode(ids.tolist(), skip_special_tokens=False) == render("a red fox, 狐")
    start, end = (library.token_to_id(token) for token in ("<|im_start|>", "<|im_end|>"))
    assert ids[0] == start and (ids == start).sum() == 2 and (ids == end).sum() == 1


def test_an_empty_prompt_is_the_bare_template(path: Path) -> None:
    tokenizer = Tokenizer(path)
    assert len(tokenizer.encode("")) == tokenizer.count("") > 3


def test_long_prompts_lose_their_end_and_are_still_counted_whole(path: Path) -> None:
    tokenizer, prompt = Tokenizer(path), "zq " * 600
    assert tokenizer.count(prompt) > MAX_TOKENS == 512
    ids = tokenizer.encode(prompt)
    assert len(ids) == MAX_TOKENS
    assert np.array_equal(ids, tokenizer.encode(prompt + "xyz"))


def test_padding_and_truncation_that_the_file_asks_for_are_not_applied(path: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(path))
    library.enable_padding(length=100)
    library.enable_truncation(5)
    library.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path / "tokenizer.json").encode("waves")
    assert np.array_equal(ours, Tokenizer(path).encode("waves"))


def test_a_tokenizer_without_chat_tokens_is_refused_by_name(tmp_path: Path) -> None:
    tokenizers.Tokenizer(tokenizers.models.BPE()).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(FormatError, match=r"tokenizer\.json: has no token <\|im_start\|>"):
        Tokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b"[1, 2"])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(FormatError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer(tmp_path / "tokenizer.json")
