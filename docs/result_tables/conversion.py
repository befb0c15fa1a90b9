"""Tables of conversions before any healing."""

from typing import Any

from result_tables.common import load, number, table, where


def methods() -> str:
    """Methods without healing: a row a method, a column a cache size."""
    study = load("methods")
    original, *rows = study["rows"]
    cuts = list(dict.fromkeys(row["reduction"] for row in rows))
    cells: dict[str, list[str]] = {"original": [number(original["perplexity"]), *[""] * len(cuts)]}
    for row in rows:
        cells.setdefault(row["name"], [""]).append(number(row["perplexity"]))
    more = load("steps")
    longer = {row["reduction"]: number(row["perplexity"]) for row in more["rows"][1:]}
    cells[more["rows"][1]["name"]] = ["", *(longer.get(cut, "") for cut in cuts)]
    head = ["", "whole cache", *(f"{-100 * cut:g} %" for cut in cuts)]
    note = (
        study_note(study, "methods")
        + f" The last row: commit {more['provenance']['commit']}, `docs/results/steps.json`"
    )
    return table(head, [[words(name), *values] for name, values in cells.items()]) + "\n\n" + note


def ingredients() -> str:
    """What each ingredient of `best` is worth."""
    study = load("ingredients")
    rows = [[words(row["name"]), number(row["perplexity"])] for row in study["rows"][1:]]
    head = [f"{-100 * study['rows'][1]['reduction']:g} %", "perplexity"]
    return table(head, rows) + "\n\n" + study_note(study, "ingredients")


def training_free() -> str:
    """The published method without healing, against the figures of its authors' code."""
    study = load("training_free")
    rows = [
        [
            row["name"],
            f"{row['rope_dim']} + {row['kv_lora_rank']}" if "rope_dim" in row else "",
            number(row["perplexity"]),
            number(row["reference"]) if row.get("reference") else "",
            f"{100 * row['against_reference']:+.1f} %" if "against_reference" in row else "",
        ]
        for row in study["rows"]
    ]
    note = (
        f"{study['model']}, first {study['text']['tokens']:,} tokens of WikiText-2's test text, float32; "
        f"{where(study['provenance'])}. `docs/results/training_free.json`"
    )
    return table(["", "R + r", "perplexity", "authors' code", "off"], rows) + "\n\n" + note


def study_note(study: dict[str, Any], file: str) -> str:
    looked = study["calibration"]
    return (
        f"{study['model']}, first {study['text']['tokens']:,} tokens of WikiText-2's test text, float32; calibrated "
        f"on {looked['tokens']:,} tokens of {len(looked['files'])} corpora; {where(study['provenance'])}. "
        f"`docs/results/{file}.json`"
    )


def words(name: str) -> str:
    return name.replace("mha2mla_2_norm", "mha2mla, 2-norm").replace("_", " ")
