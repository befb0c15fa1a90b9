"""What all tables are made with: results, cells, and where a result comes from."""

import json
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parents[1] / "results"


def load(name: str) -> Any:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *["---:"] * (len(head) - 1)]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [head, rule, *rows])


def number(value: float | None) -> str:
    if value is None:
        return "missing"
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 100 else f"{value:.2f}"


def where(provenance: dict[str, Any]) -> str:
    machine, versions = provenance["hardware"], provenance["versions"]
    device = f"{machine['cores']} CPU cores{' with bfloat16' if machine.get('bfloat16') else ''}, no GPU"
    device = ", ".join(machine["gpus"]) if machine.get("gpus") else device
    libraries = f"torch {versions['torch']}, transformers {versions['transformers']}"
    return f"commit {provenance['commit']}, {device}, {libraries}"
