"""PEFT's patterns mean what they mean in PEFT, and cost little whatever they are."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from dmd2.models.adapters.lora_keys import MOST_EXPRESSIONS, Patterns, parse
from dmd2.runtime.errors import UserError

WORDS = st.sampled_from(["down_blocks", "0", "1", "attn1", "attn2", "to_q", "to_out", "conv1", "conv", "proj_in"])
LAYERS = st.lists(WORDS, min_size=1, max_size=5).map(".".join)
PATTERNS = st.one_of(
    LAYERS,
    LAYERS.map(lambda layer: f"^{layer}"),
    LAYERS.map(lambda layer: layer.replace(".", "\\.")),
    st.tuples(LAYERS, LAYERS).map(lambda two: f"{two[0]}.*{two[1]}"),
    st.tuples(LAYERS, LAYERS).map(lambda two: f"({two[0]}|{two[1]})"),
    LAYERS.map(lambda layer: layer.replace("0", r"\d+").replace("attn1", "attn[12]")),
    LAYERS.map(lambda layer: layer[1:]),
)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(patterns=st.lists(PATTERNS, unique=True, max_size=6), layer=LAYERS)
def test_the_first_pattern_that_a_name_ends_in_counts_as_in_peft(patterns: list[str], layer: str) -> None:
    values = {pattern: float(n) for n, pattern in enumerate(patterns)}
    try:
        ours = Patterns(values, "x")
    except UserError:  # such as "?.*…", of a name cut short; or too complex for us
        assert any("*" in pattern for pattern in patterns)
        return
    assert ours.find(layer) == values.get(get_pattern_key(patterns, layer))


@pytest.mark.parametrize(
    "pattern",
    [
        "(a+)+",
        "(a|a)*b",
        "a*b*c*d",
        ".*.*.*x",
        "a?" * 20,
        "x" * 400 + "|" + "y" * 400,
        r"(a)\1",
        "(a{9}){9}",
        "(",
        "a{9999999999}",
    ],
)
def test_patterns_that_could_take_for_ever_or_are_none_are_refused(pattern: str) -> None:
    with pytest.raises(UserError, match=r"^x: pattern .*: (too complex|is no regular expression)$"):
        Patterns({pattern: 1.0}, "x")


def test_patterns_are_limited() -> None:
    assert Patterns({f"a{n}": float(n) for n in range(100_000)}, "x").find("b.a99999") == 99999
    with pytest.raises(UserError, match=f"^x: more than {MOST_EXPRESSIONS} regular expressions"):
        Patterns({f"a.*b{n}": 1.0 for n in range(MOST_EXPRESSIONS + 1)}, "x")


@settings(max_examples=300, deadline=None, derandomize=True)
@given(key=st.text(st.sampled_from("lora_unet.te1AB0_weightdownup\n\x00é"), max_size=60) | st.text(max_size=30))
def test_any_name_is_parsed_skipped_or_refused_in_one_line(key: str) -> None:
    try:
        parsed = parse("x", key)
    except UserError as error:
        assert str(error).isprintable() and len(str(error)) < 300
    else:
        assert parsed is None or parsed[0] in ("unet", "text_encoder", "text_encoder_2")
