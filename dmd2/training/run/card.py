"""The card of a model that a run has made: what it is and what made it. It claims no figures."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any


def model_card(what: str, licence: str, text: str, recipe: Any) -> str:
    """Markdown.

    Args:
        what: such as "4-step student".
        licence: of the weights.
        text: one paragraph: where it comes from.
        recipe: the dataclass.
    """
    return f"""# {what[:1].upper() + what[1:]}

{text}

Made by `dmd2 train`. Nothing here says how good it is: the figures of the run are in its `log.jsonl`, and
`dmd2 evaluate` measures. `dmd2 generate --weights` and `dmd2 cog --weights` take this folder; diffusers takes a text
model, where its UNet is not in `unet`, with `unet=UNet2DConditionModel.from_pretrained(folder, subfolder="…")`.

Licence: {licence}

## Recipe

```json
{json.dumps(asdict(recipe), indent=2)}
```
"""
