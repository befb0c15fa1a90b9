"""Perplexity and KL of conversions that nothing has healed: what each choice of pairs and factors costs by itself.

    python -m eval.training_free study.text=wikitext2_test.txt                     the published method
    python -m eval.training_free study=methods study.text=wikitext2_test.txt       all methods at four cache sizes
    python -m eval.training_free study=ingredients study.text=wikitext2_test.txt   what each part of `best` is worth
    python -m eval.training_free study=formats study.text=wikitext2_test.txt       ranks and bits out of one budget

Every point of `study.points`, at every one of `study.reductions`, is converted from the same original and measured on
the same windows in float32; statistics and reconstruction run in bfloat16 where the hardware computes in it.
Writes `outputs/<model>/<study.name>.json`, one row a point, with its reference where there is one.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from omegaconf import DictConfig

from conf.checkpoint import NOT_OURS, load_model
from conf.errors import stage_main
from conf.models import local_model
from conf.plan import plain, write_result
from conf.precision import native_autocast
from conf.pretrained import load_tokenizer
from conf.progress import Progress
from conf.schema import Config, StudyConfig, StudyPoint
from conf.stage import fingerprint, provenance
from data.calibration import calibration_batches
from data.tokens import check_ids
from data.windows import text_windows
from eval.divergence import divergence
from eval.perplexity import perplexity
from mha2mla import ConversionOptions, collect_statistics, convert, needs_calibration, reconstruct, resolve_options

COLUMNS = "{:<26} {:>4} {:>4} {:>8} {:>10} {:>6} {:>9} {:>6}"


def chosen_points(study: StudyConfig) -> list[tuple[str, StudyPoint]]:
    """The study's points with their names, each at every one of its reductions."""
    if not study.reductions:
        return list(study.points.items())
    return [(name, replace(point, reduction=cut)) for cut in study.reductions for name, point in study.points.items()]


def rows(config: Config) -> Iterator[dict[str, Any]]:
    """The original's perplexity, then a row for every point as it is measured."""
    study = config.study
    if not study.text or not Path(study.text).is_file():
        raise ValueError(f"study.text={study.text}: give a plain text file to measure perplexity on")
    source = local_model(config)
    model: Any = load_model(source, torch.float32, NOT_OURS, config.model.revision)
    tokenizer = load_tokenizer(source, config.model.revision)
    windows = text_windows(tokenizer, Path(study.text), study.sequence_length, study.tokens)
    check_ids(f"study.text={study.text}", windows, tokenizer, model.config)
    points = [(name, point, ConversionOptions.from_config(point)) for name, point in chosen_points(study)]
    for _, _, options in points:
        resolve_options(model.config, options)
    statistics, calibration = None, []
    if any(needs_calibration(options) or point.reconstructions for _, point, options in points):
        calibration = list(calibration_batches(config, tokenizer))
        check_ids("data for calibration", calibration, tokenizer, model.config)
        tokens = sum(batch.numel() for batch in calibration)
        with native_autocast("cpu"), Progress("statistics", tokens, "tokens") as progress:
            statistics = collect_statistics(model, calibration, progress.advance)
    yield {"name": "original", "perplexity": perplexity(model, windows)}
    for name, point, options in points:
        converted, report = convert(model, options, statistics, batches=calibration)
        if point.reconstructions:
            layers = model.config.num_hidden_layers
            with native_autocast("cpu"), Progress(f"reconstruct {name}", layers, "layers") as progress:
                steps, rate = point.reconstructions, point.reconstruction_learning_rate
                reconstruct(model, converted, calibration, steps, rate, lambda *_: progress.advance(1))
        found = divergence(model, converted, windows)
        sizes: dict[str, Any] = {"rope_dim": report.options.rope_dim, "kv_lora_rank": report.options.kv_lora_rank}
        sizes["bits_per_token"] = report.bits
        losses = {"perplexity": found.perplexity_converted, "kl_divergence": found.kl_divergence}
        row = {"name": name} | plain(point) | sizes | {"reduction": report.reduction} | losses
        if point.reference:
            row["against_reference"] = found.perplexity_converted / point.reference - 1
        yield row


@stage_main
def run(config: Config) -> None:
    found = []
    print(COLUMNS.format("", "R", "r", "cache", "perplexity", "KL", "reference", "off"))
    for row in rows(config):
        off = row.get("against_reference")
        print(
            COLUMNS.format(
                row["name"],
                row.get("rope_dim") or "",
                row.get("kv_lora_rank") or "",
                f"{-100 * row['reduction']:.2f} %" if "reduction" in row else "",
                f"{row['perplexity']:,.2f}",
                f"{row['kl_divergence']:.3f}" if "kl_divergence" in row else "",
                f"{row['reference']:,g}" if row.get("reference") else "",
                f"{100 * off:+.1f} %" if off is not None else "",
            ),
            flush=True,
        )
        found.append(row)
    text = {"file": Path(str(config.study.text)).name, "fingerprint": fingerprint(str(config.study.text))}
    corpora = [Path(file).name for source in config.data.sources.values() for file in source.data_files]
    calibration = plain(config.calibration) | {"data": config.data.name, "files": corpora}
    measured = {"tokens": config.study.tokens, "sequence_length": config.study.sequence_length, "dtype": "float32"}
    write_result(
        config,
        config.study.name,
        {"model": config.model.name, "text": text | measured, "rows": found}
        | {"calibration": calibration, "provenance": provenance()},
    )


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    run(cfg)


if __name__ == "__main__":
    main()
