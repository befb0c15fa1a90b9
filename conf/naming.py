"""The folder name of a point: the method it is nearest to, what differs from it, and the sizes.

`best-cut0.875`, `mha2mla-R24-r48`, `best+value_weight-0.5-cut0.75`. Two points that differ have different names,
so a sweep over any option keeps them apart.
"""

from dataclasses import fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

SIZES = {"rope_dim": "R", "kv_lora_rank": "r", "q_lora_rank": "q"}
# Those of the library by rank and with fewer bits; it is not imported here, since it would load torch.
DEFAULT_CUT, DEFAULT_BYTES = 0.6875, 0.875


def point_name(mla: Any) -> str:
    """Name of an `MLAConfig`."""
    defaults = {item.name: item.default for item in fields(mla)}
    given = {name: getattr(mla, name) for name in defaults if name not in (*SIZES, "reduction")}
    changes = {
        method: {name: value for name, value in given.items() if value != preset.get(name, defaults[name])}
        for method, preset in presets().items()
    }
    nearest = min(changes, key=lambda method: len(changes[method]))
    parts = [nearest + "".join(f"+{name}-{value}" for name, value in changes[nearest].items())]
    parts += [f"{letter}{getattr(mla, name)}" for name, letter in SIZES.items() if getattr(mla, name)]
    cut = mla.reduction or (DEFAULT_CUT if mla.bits == "16" else DEFAULT_BYTES)
    if not mla.kv_lora_rank or (mla.bits == "auto" and mla.reduction):
        parts.append(f"cut{cut:g}")
    return "-".join(parts)


@lru_cache
def presets() -> dict[str, dict[str, Any]]:
    """What every file of conf/method/ sets, by its name."""
    files = sorted((Path(__file__).parent / "method").glob("*.yaml"))
    return {file.stem: yaml.safe_load(file.read_text()) for file in files}
