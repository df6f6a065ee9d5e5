"""How files name the layers that a LoRA changes, and where they say its strength.

Spellings: kohya's, with Stability's or diffusers' names of blocks; diffusers', three generations of it; PEFT's, with
or without a prefix; ComfyUI's. Strength: a tensor `alpha` beside the factors; PEFT's settings, in an
`adapter_config.json` or in the file's metadata; alphas in the metadata.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, ValidationError

from dmd2.runtime.errors import UserError, first_error, shown

LONGEST_SETTINGS = 1_000_000
"""characters of JSON in the metadata"""
MOST_QUOTED = 100
"""characters of a tensor's name, in messages"""
PATTERN_SECONDS = 10.0
"""that all of a file's patterns may take"""
MOST_EXPRESSIONS = 500
"""of a file's patterns, besides plain names"""

Layer = tuple[str, str]
"""(unet, text_encoder or text_encoder_2; the layer's name with _ for each dot)"""

_WHAT = re.compile(
    r"(?:[._]lora(?:_linear_layer)?[._](?P<factor>A|B|down|up|mid)(?:\.(?!(?:weight|bias)$)[\w-]+)?\.(?P<of>weight|bias)"
    r"|\.(?P<magnitude>lora_magnitude_vector)(?:\.[\w-]+){0,2}"
    r"|\.(?P<factors>hada_(?:w[12]_[ab]|t[12])|lokr_(?:w[12](?:_[ab])?|t[12]))(?:\.[\w-]+)?"
    r"|\.(?P<plain>alpha|dora_scale|diff|diff_b|w_norm|b_norm))$"
)
_FACTORS = {"A": "down", "B": "up", "w_norm": "diff", "b_norm": "diff_b"}
_OTHER_KINDS = {
    "oft_": "OFT",
    "boft": "BOFT",
    "vera_lambda": "VeRA",
    "ia3_l": "IA³",
    ".on_input": "IA³",
    "lora_embedding_": "a LoRA of embeddings",
    ".set_weight": "a whole weight",
    ".modules_to_save": "a whole weight (modules_to_save)",
    "token_adapter": "a LoRA of single tokens",
}
_BLOCKS = (
    r"(?:(?:down|up)_blocks|mid_block|input_blocks|middle_block|output_blocks)\.|out\.\d|conv_(?:in|out|norm_out)\."
)
_PREFIXES = [
    (re.compile(pattern), part)
    for pattern, part in (
        (r"(?:lora_unet_|lycoris_(?:unet_)?|unet\.|(?:model\.)?diffusion_model\.)", "unet"),
        (r"(?:lora_te1?_|text_encoder\.|(?:text_encoders\.)?clip_l\.(?:transformer\.)?)", "text_encoder"),
        (r"(?:conditioner\.embedders\.0\.|cond_stage_model\.)transformer\.", "text_encoder"),
        (r"(?:lora_te2_|text_encoder_2\.|(?:text_encoders\.)?clip_g\.(?:transformer\.)?)", "text_encoder_2"),
        (rf"(?={_BLOCKS}|(?:time|add)_embedding\.|time_embed\.|label_emb\.)", "unet"),
        (r"(?=text_model\.|encoder\.layers\.|text_projection\.)", "text"),
    )
]
_OLD_TEXT = re.compile(r"self_attn\.to_(q|k|v|out)$")
_HARMLESS_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")
"""PEFT's ways to begin a training that leave the network's own weights as they are"""
_UNSUPPORTED = (
    *("layer_replication", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "kasa_config"),
    "target_parameters",
)
"""settings of PEFT's, by which an adapter does more than add to weights"""


class Settings(BaseModel):
    """PEFT's settings that say what a file's tensors mean, with PEFT's defaults."""

    model_config = ConfigDict(extra="allow")

    peft_type: str = "LORA"
    r: int = Field(8, ge=1, le=1_000_000)
    lora_alpha: FiniteFloat = 8.0
    alpha: FiniteFloat = 8.0
    """lora_alpha's name with LoHa and LoKr"""
    use_rslora: bool = False
    use_dora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, FiniteFloat] | None = None
    init_lora_weights: bool | str | None = True
    auto_mapping: dict[str, Any] | None = None


def read_settings(content: object, where: str) -> Settings:
    """`content` as settings.

    Raises:
        UserError: they are none, or ask for more than adding to weights. `where` begins the message.
    """
    try:
        settings = Settings.model_validate(content)
    except ValidationError as error:
        raise UserError(f"{where}: {first_error(error)}") from None
    if settings.peft_type.upper() not in ("LORA", "LOHA", "LOKR"):
        raise UserError(f"{where}: peft_type {shown(settings.peft_type, 50)}; expected LORA, LOHA or LOKR")
    if settings.init_lora_weights not in _HARMLESS_STARTS:
        raise UserError(
            f"{where}: init_lora_weights {shown(settings.init_lora_weights, 50)}: its factors belong to a network "
            "whose weights were changed before the training; expected it converted to plain LoRA "
            "(path_initial_model_for_weight_conversion)"
        )
    for name in _UNSUPPORTED:
        if (settings.model_extra or {}).get(name):
            raise UserError(f"{where}: {name}: not supported; expected a plain adapter")
    return settings


def read_json(text: str, where: str) -> Any:
    """A JSON object. Raises UserError if it is none, too long, or nested too deeply."""
    if len(text) > LONGEST_SETTINGS:
        raise UserError(f"{where}: longer than {LONGEST_SETTINGS} characters")
    try:
        return json.loads(text)
    except RecursionError:
        raise UserError(f"{where}: nested too deeply; expected PEFT's settings") from None
    except ValueError as error:
        raise UserError(f"{where}: cannot be read ({shown(error, 100)})") from None


def is_pefts(key: str) -> bool:
    """Whether a tensor's name is one of PEFT's own: that of a single network, without the network's name."""
    return key.startswith("base_model.") or any(match.end() == 0 for r, _ in _PREFIXES if (match := r.match(key)))


def parse(name: str, key: str, text_part: str = "text_encoder") -> tuple[str, str, str] | None:
    """A tensor's name → the part and the layer (with dots where the file has them) that it is of, and what it is.

    Args:
        name: what messages call the file.
        text_part: which text encoder is meant where the name does not say.

    Returns:
        None for what belongs to no network: an extra.

    Raises:
        UserError: it belongs to another kind of adapter, or to no layer of Stable Diffusion.
    """
    told = shown(key, MOST_QUOTED)
    for mark, kind in _OTHER_KINDS.items():
        if mark in key:
            raise UserError(f"LoRA {name}: {told}: is {kind}; expected LoRA, LoCon, DoRA, LoHa, LoKr or differences")
    rest = re.sub(r"^base_model\.(?:model\.)?", "", key)
    part, prefix = next(((p, m.group()) for r, p in _PREFIXES if (m := r.match(rest))), ("", ""))
    match = _WHAT.search(rest)
    if not part and rest != key:
        part = "unet"  # of a network that has no such layer, as will be said
    if match is None or not part:
        if match is None and not part:
            return None
        whole = " (whole weights, as of modules_to_save or bias, are not taken)" * rest.endswith((".weight", ".bias"))
        raise UserError(f"LoRA {name}: {told}: is no name of a LoRA for Stable Diffusion{whole * (match is None)}")
    layer = rest[len(prefix) : match.start()].removeprefix("base_model.model.")
    layer = layer.replace(".processor.", ".").replace("_processor_", "_")
    found = match["factor"] or match["magnitude"] or match["factors"] or match["plain"]
    what = "bias" if match["of"] == "bias" else _FACTORS.get(found, found)
    if part == "text":
        part = text_part
    if part == "unet":
        layer = re.sub(r"([._])to_out$", r"\1to_out\g<1>0", layer)  # diffusers' first way: to_out_lora
    else:
        layer = _OLD_TEXT.sub(r"self_attn.\1_proj", layer)
    return part, layer, what


class Patterns:
    """PEFT's `rank_pattern` and `alpha_pattern`: the value of the first expression that a layer's name ends in.

    PEFT's rule: an expression matches the whole name, or what follows one of its dots. Those that are plain names, as
    nearly all are, are looked up; what a stranger can make a regular expression cost is bounded.

    Raises:
        UserError: an expression is none, or could take for ever.
    """

    def __init__(self, patterns: Mapping[str, float] | None, where: str) -> None:
        self._where, self._spent = where, 0.0
        self._plain: dict[str, tuple[int, float]] = {}
        self._expressions: list[tuple[int, re.Pattern[str], float]] = []
        for index, (pattern, value) in enumerate((patterns or {}).items()):
            plain = pattern.replace("\\.", ".")
            if re.fullmatch(r"\^?[\w.]+", plain):
                self._plain.setdefault(plain, (index, value))
                continue
            # Nested or many repeats are where matching takes exponential time. Those of digits have few to repeat.
            repeats = re.findall(r"(?<!\\d)[*+{]|(?<!\()\?", pattern)
            digits = pattern.count("\\d")
            if len(pattern) > 500 or len(repeats) > 2 or digits > 6 or re.search(r"\)[*+{?]|\\[1-9]|\(\?P=", pattern):
                raise UserError(f"{where}: pattern {shown(pattern, 50)}: too complex")
            try:
                expression = re.compile(rf"(.*\.)?({pattern})$")
            except (re.error, RecursionError, OverflowError):
                raise UserError(f"{where}: pattern {shown(pattern, 50)}: is no regular expression") from None
            self._expressions.append((index, expression, value))
            if len(self._expressions) > MOST_EXPRESSIONS:
                raise UserError(f"{where}: more than {MOST_EXPRESSIONS} regular expressions")

    def find(self, layer: str) -> float | None:
        """The value for a layer (with dots), None if no pattern matches."""
        begun = time.monotonic()
        pieces = layer.split(".")
        ends = [f"^{layer}", *(".".join(pieces[n:]) for n in range(len(pieces)))]
        best = min((self._plain[end] for end in ends if end in self._plain), default=(math.inf, None))
        strange = len(layer) > 200 or re.search(r"\d{4}", layer)  # in no network, and costly
        for index, expression, value in self._expressions:
            if strange or index > best[0]:
                break
            if self._spent + time.monotonic() - begun > PATTERN_SECONDS:
                raise UserError(f"{self._where}: its patterns take too long")
            if expression.match(layer):
                best = (index, value)
                break
        self._spent += time.monotonic() - begun
        return best[1]
