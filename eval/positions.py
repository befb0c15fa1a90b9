"""Perplexity by position in long documents: whether a model holds beyond the sequences it was converted on.

    python -m eval.positions original=FOLDER healed=FOLDER --files books.jsonl.gz --output docs/results/positions

Models are checkpoint folders under names of one's own; the first is what the others are compared with. The first
`length` tokens of `documents` documents that have so many are read, each as one sequence. Writes OUTPUT.json, the
perplexity in every range of positions, which double in length, and OUTPUT.png.
"""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers

from conf.checkpoint import load_model
from conf.errors import ends_in_one_line
from conf.precision import computes_bfloat16, native_autocast
from conf.pretrained import load_config, load_tokenizer
from conf.progress import counted
from conf.schema import SourceConfig
from conf.stage import provenance, write_json
from data.skipped import Skipped, tell
from data.sources import list_parts, read_texts
from data.tokens import check_ids, plain_ids
from eval.arguments import named_checkpoints
from eval.picture import quiet_pyplot, save
from mha2mla.output_head import next_token_losses, perplexity_of

SHORTEST = 256  # tokens of the first range


def long_documents(files: list[str], tokenizer: Any, length: int, count: int) -> list[torch.Tensor]:
    """int64 [length] of the first documents, file by file in turn, that have so many tokens; ValueError if too few."""
    skipped = {file: Skipped() for file in files}
    streams = [texts(file, skipped[file]) for file in files]
    found: list[torch.Tensor] = []
    while streams and len(found) < count:
        stream = streams.pop(0)
        for text in stream:
            ids = plain_ids(tokenizer, text[: 8 * length])
            if len(ids) >= length:
                found.append(torch.tensor(ids[:length]))
                streams.append(stream)
                break
    if len(found) < count:
        raise ValueError(f"{len(found)} documents of {length} tokens found, {count} wanted; give more --files")
    tell("positions", skipped)
    return found


def texts(file: str, skipped: Skipped) -> Iterator[str]:
    for part in list_parts("files", SourceConfig(data_files=[file]), 0):
        yield from read_texts(part, skipped)


def ranges(length: int) -> list[tuple[int, int]]:
    """[0, 256), [256, 512), [512, 1024), … up to `length`."""
    bounds = [0, SHORTEST]
    while bounds[-1] < length:
        bounds.append(min(2 * bounds[-1], length))
    return list(zip(bounds, bounds[1:], strict=False))


@torch.inference_mode()
def losses(model: Any, ids: torch.Tensor) -> torch.Tensor:
    """Loss in nats of every token but the first, [length - 1]."""
    with native_autocast(model.device.type):
        return next_token_losses(model, ids[None])[0, :-1].double().cpu()


def measure(models: dict[str, Path], documents: list[torch.Tensor]) -> dict[str, list[float]]:
    """Perplexity of every model in every range of positions, over all documents."""
    found = {}
    for name, folder in models.items():
        model = load_model(folder, torch.float32)
        total = sum(losses(model, document) for document in counted(documents, name, "documents"))
        assert isinstance(total, torch.Tensor)
        by_range = [total[max(0, first - 1) : last - 1] for first, last in ranges(len(documents[0]))]
        found[name] = [perplexity_of(float(part.mean()) / len(documents)) for part in by_range]
        print(f"{name:<18}" + "".join(f"{value:>10,.2f}" for value in found[name]), flush=True)
    return found


def draw(rows: dict[str, list[float]], places: list[tuple[int, int]], file: Path) -> None:
    """Ratio to the first model over the end of each range of positions."""
    pyplot = quiet_pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4), dpi=130, layout="constrained")
    reference = next(iter(rows.values()))
    for name, values in rows.items():
        ratios = [value / base for value, base in zip(values, reference, strict=True)]
        axes.plot([last for _, last in places], ratios, marker="o", markersize=4, label=name)
    axes.set_xscale("log", base=2)
    axes.set_xticks([last for _, last in places], [f"{first}-{last}" for first, last in places], fontsize=8)
    axes.set_xlabel("position in the document (tokens)")
    axes.set_ylabel(f"perplexity, times that of {next(iter(rows))}")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.legend(frameon=False)
    save(figure, file)


@ends_in_one_line()
def main() -> None:
    transformers.utils.logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", metavar="NAME=FOLDER")
    parser.add_argument("--files", nargs="+", required=True, help="documents: JSON lines, Parquet or text")
    parser.add_argument("--length", type=int, default=4096, help="tokens of a document")
    parser.add_argument("--documents", type=int, default=8)
    parser.add_argument("--output", type=Path, required=True, help="path of the JSON and the picture, without suffix")
    options = parser.parse_args()
    try:
        models = named_checkpoints(options.models)
        tokenizer = load_tokenizer(next(iter(models.values())))
        documents = long_documents(options.files, tokenizer, options.length, options.documents)
        for folder in models.values():
            check_ids(f"--files for {folder}", documents, tokenizer, load_config(folder))
    except ValueError as error:
        parser.exit(1, f"error: {error}\n")
    places = ranges(options.length)
    print(f"{'tokens':<18}" + "".join(f"{f'{first}-{last}':>10}" for first, last in places))
    rows = measure(models, documents)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "positions": places,
        "perplexity": rows,
        "documents": len(documents),
        "length": options.length,
        "dtype": "bfloat16 (autocast)" if computes_bfloat16(on_cpu=True) else "float32",
        "files": [Path(file).name for file in options.files],
        "provenance": provenance(),
    }
    write_json(options.output.with_suffix(".json"), result)
    draw(rows, places, options.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
