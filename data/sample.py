"""Stage `sample`: the corpus for healing, drawn, tokenised, packed and written once.

    python -m data.sample                                    # text of the Python environment
    python -m data.sample data=local 'data.files=[my/*.jsonl.gz]' data.tokens=10_000_000
    python -m data.sample data=smollm model=from_path model.path=HuggingFaceTB/SmolLM-135M

The budget is `data.tokens`, else `data.fraction` of the model's pretraining tokens, divided over the sources
by weight. Which documents are taken depends on seed and documents alone (data/documents.py): of each source
those with the lowest hashes, copies once, and for training none that is held out for validation.

Local files are read whole. A hub dataset or the environment is not: its files are visited in an order given
by seed and file names, a stretch from the start of each, until there is enough, and the lowest hashes are
taken of what was read. There a document's place in its dataset matters too, but still neither the number of
workers nor a restart.

Written: `train-*.parquet` and `validation-*.parquet` (data/pack.py), `manifest.json`. Memory stays flat:
texts and tokens wait on disk in sorted runs (data/runs.py). A run that was killed reads on where it was.
The manifest counts by source what was skipped: rows without text, files without a row, a few bad rows.
"""

import hashlib
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import datasets
import hydra
import numpy as np
from omegaconf import DictConfig

from conf.errors import stage_main
from conf.models import local_model
from conf.plan import Plan
from conf.progress import Progress, counted
from conf.schema import Config
from conf.stage import write_json
from data.documents import TRAIN, VALIDATION, Split
from data.draw import Drawn, Source, draw, open_sources
from data.pack import write_shards
from data.runs import merge
from data.skipped import Skipped
from data.tokens import check_ids
from data.workers import end_of


def sample(config: Config) -> None:
    """Run the stage: shards and manifest in the folder of `Plan(config).sample`."""
    stage = Plan(config).sample
    if stage.skip(config.force):
        return
    print("sample: opening the sources", flush=True)
    tokenizer = load_tokenizer(config)
    sources = open_sources(config, tokenizer)
    with stage.run(resumable=True, force=config.force):
        work = stage.folder / "work"
        drawn = draw(config, sources, tokenizer, work)
        model = model_config(config)
        shards = [
            path
            for side in (TRAIN, VALIDATION)
            for path in write_side(config, drawn[side], side, work, tokenizer, model)
        ]
        manifest = describe(config, sources, drawn, tokenizer)
        manifest["shards"] = {path.name: file_hash(path) for path in counted(shards, "sample: hash", "shards")}
        for path in shards:
            path.replace(stage.folder / path.name)
        write_json(stage.folder / "manifest.json", manifest)
        shutil.rmtree(work)
        stage.metrics.update(manifest)
    print_summary(manifest, stage.folder)


def load_tokenizer(config: Config) -> Any:
    from conf import pretrained

    tokenizer = pretrained.load_tokenizer(local_model(config), config.model.revision)
    end = end_of(tokenizer, config.data.document_end)
    check_ids("the end of every document", [] if end is None else [[end]], tokenizer, model_config(config))
    return tokenizer


def model_config(config: Config) -> Any:
    """The model's own; None for a folder that holds a tokenizer and no model."""
    from conf import pretrained

    try:
        return pretrained.load_config(local_model(config), config.model.revision)
    except ValueError:
        return None


def checked(documents: Iterable[np.ndarray], tokenizer: Any, model: Any) -> Iterator[np.ndarray]:
    """The same documents; ValueError at one with a token that the model does not embed."""
    for ids in documents:
        check_ids("data for training", [ids], tokenizer, model)
        yield ids


def write_side(config: Config, drawn: Drawn, side: str, work: Path, tokenizer: Any, model: Any) -> list[Path]:
    """Pack one side's documents, in the order of their hashes, into shards."""
    data = config.data
    ids: Iterator[np.ndarray] = (np.frombuffer(record.payload, np.int32) for record in merge(drawn.runs))
    documents = checked(ids, tokenizer, model)
    rows_per_shard = max(1, data.shard_tokens // data.sequence_length)
    rows = drawn.tokens // data.sequence_length
    with Progress(f"sample: pack {side}", drawn.tokens, "tokens") as progress:
        shown = (progress.passed(tokens, len(tokens)) for tokens in documents)
        return write_shards(shown, rows, data.sequence_length, rows_per_shard, work, side)


def describe(config: Config, sources: list[Source], drawn: dict[str, Drawn], tokenizer: Any) -> dict[str, Any]:
    """The manifest: what was wanted of each source and what it gave."""
    total_weight = sum(source.weight for source in sources)
    by_source = {
        source.name: {
            "wanted_share": source.weight / total_weight,
            "reached_share": drawn[TRAIN].taken[i].tokens / drawn[TRAIN].tokens,
            "tokens": drawn[TRAIN].taken[i].tokens,
            "documents": drawn[TRAIN].taken[i].documents,
            "validation_tokens": drawn[VALIDATION].taken[i].tokens,
            "validation_documents": drawn[VALIDATION].taken[i].documents,
            "skipped": asdict(Skipped.sum(drawn[TRAIN].skipped[i], drawn[VALIDATION].taken[i].skipped)),
        }
        for i, source in enumerate(sources)
    }
    length = config.data.sequence_length
    return {
        "tokens": drawn[TRAIN].tokens // length * length,
        "documents": sum(taken.documents for taken in drawn[TRAIN].taken),
        "sequences": drawn[TRAIN].tokens // length,
        "validation_tokens": drawn[VALIDATION].tokens // length * length,
        "validation_documents": sum(taken.documents for taken in drawn[VALIDATION].taken),
        "validation_sequences": drawn[VALIDATION].tokens // length,
        "sequence_length": length,
        "seed": config.data.seed,
        "held_out_share": Split.of(config).held_out,
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "sources": by_source,
    }


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of the whole definition where there is one (fast tokenizers), else of the vocabulary."""
    fast = tokenizer.is_fast
    definition = tokenizer.backend_tokenizer.to_str() if fast else sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(f"{definition}|{tokenizer.eos_token_id}".encode()).hexdigest()[:16]


def file_hash(path: Path) -> str:
    sha = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            sha.update(block)
    return sha.hexdigest()


def print_summary(manifest: dict[str, Any], folder: Path) -> None:
    print(
        f"sample: {manifest['tokens']:,} tokens of {manifest['documents']:,} documents in {manifest['sequences']:,} "
        f"sequences,\n  {manifest['validation_tokens']:,} tokens held out, in {folder}"
    )
    for name, source in manifest["sources"].items():
        print(
            f"  {name[:30]:30} {source['reached_share']:7.2%} of {source['wanted_share']:7.2%} wanted"
            f"  {source['tokens']:>14,} tokens"
        )
        if skipped := str(Skipped(**source["skipped"])):
            print(f"    skipped: {skipped}")


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    datasets.disable_progress_bars()
    stage_main(sample)(cfg)


if __name__ == "__main__":
    main()
