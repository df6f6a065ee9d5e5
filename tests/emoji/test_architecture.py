"""The embedded model's untrained parts: a tokenizer that is the same in every process."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.emoji.architecture import build_tokenizer

WORDS = st.sets(st.text("abcdeé", min_size=1, max_size=6), min_size=1, max_size=12)


def test_ties_between_pairs_are_broken_by_the_alphabet() -> None:
    """A run that goes on builds its tokenizer anew: other numbers for the same words would undo what was learned."""
    vocabulary = build_tokenizer(["b", "abc", "ab"]).get_vocab()
    new = sorted(vocabulary, key=vocabulary.__getitem__)[512:]
    assert new == ["ab", "ab</w>", "abc</w>", "<|startoftext|>", "<|endoftext|>"]


def test_the_most_frequent_pair_comes_first() -> None:
    vocabulary = build_tokenizer(["zy", "zyx", "zyw", "ab"]).get_vocab()
    assert sorted(vocabulary, key=vocabulary.__getitem__)[512] == "zy"


@given(WORDS)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_each_word_is_one_token_whatever_the_order(words: set[str]) -> None:
    tokenizer = build_tokenizer(sorted(words))
    assert tokenizer.get_vocab() == build_tokenizer(sorted(words, reverse=True)).get_vocab()
    for word in words:
        assert len(tokenizer(word)["input_ids"]) == 3  # with start and end
        assert tokenizer.decode(tokenizer(word)["input_ids"], skip_special_tokens=True).strip() == word
