"""Stage `convert`: the pretrained model becomes one with latent attention.

    python -m train.convert model=from_path model.path=org/name mla.kv_lora_rank=64

Writes a checkpoint that loads by itself, and `conversion.json`: what was asked for, what each layer lost, and the
perplexity of original and converted model on text that no later stage trains on.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import psutil
import torch
import transformers
from huggingface_hub import snapshot_download
from omegaconf import DictConfig
from tqdm import tqdm

from conf.checkpoint import NOT_OURS, load_model
from conf.devices import pick_device
from conf.errors import stage_main
from conf.memory import peak_memory_gib
from conf.models import local_model
from conf.plan import Plan
from conf.precision import Dtype, native_autocast, torch_dtype
from conf.pretrained import load_config, load_generation_config, load_tokenizer, skeleton
from conf.schema import Config, Streamed
from conf.stage import write_json
from data.calibration import calibration_batches, heldout_batches
from mha2mla import (
    ConversionOptions,
    ConversionReport,
    collect_statistics,
    convert,
    reconstruct,
    resolve_options,
)
from mha2mla.compare import Comparison, compare
from mha2mla.families import family_of
from mha2mla.reconstruct import LayerFit
from mha2mla.streaming import PROGRESS, STATE, convert_streamed, forget_progress
from train.checkpoint import appearing_in
from train.resources import sizes_of

MOST = 0.7  # of free memory, that a conversion in memory may take


def pretrained_config(config: Config) -> Any:
    """The original's own configuration; ValueError if it cannot be read or converted with these options."""
    plan = Plan(config)
    if plan.converses:  # calibration reads them
        plan.converse.require_finished()
    pretrained = load_config(local_model(config), config.model.revision)
    load_generation_config(local_model(config), config.model.revision)  # read at the end, where an error costs more
    family_of(pretrained)
    skeleton(config.model.path, pretrained)
    resolve_options(pretrained, ConversionOptions.from_config(config.mla))
    pick_device(config.launch.device)
    return pretrained


def load_pretrained(config: Config) -> Any:
    """The original model on the device that conversion runs on."""
    device = pick_device(config.launch.device)
    dtype = torch_dtype(config.model.dtype, device == "cpu", stored="auto")
    model: Any = load_model(local_model(config), dtype, NOT_OURS, revision=config.model.revision)
    return model.to(device).eval()


def convert_model(config: Config, folder: Path) -> dict[str, Any]:
    """Convert, measure and save into `folder`; returns the stage's metrics."""
    model = load_pretrained(config)
    tokenizer = load_tokenizer(local_model(config), config.model.revision)
    heldout = list(heldout_batches(config, tokenizer))
    print(f"convert: collecting statistics over {config.calibration.tokens:,} tokens", flush=True)
    # Means over thousands of tokens do not need float32 products; the sums are float32 all the same.
    with native_autocast(model.device.type):
        calibration = list(calibration_batches(config, tokenizer))
        statistics = collect_statistics(model, calibration)
    converted, report = convert(model, ConversionOptions.from_config(config.mla), statistics)
    print(f"convert: {summary(report.cache_size, report.original_cache_size, report.reduction)}", flush=True)
    found = report.to_dict()
    if config.mla.reconstruction_steps:
        found["comparison_before_reconstruction"] = asdict(compare(model, converted, heldout))
        with native_autocast(model.device.type):
            found["reconstruction"] = fit_layers(model, converted, calibration, config)
    comparison = compare(model, converted, heldout)
    with appearing_in(folder) as whole:
        converted.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        write_json(whole / "conversion.json", found | {"comparison": asdict(comparison)})
    return metrics(report, comparison, statistics.tokens, model.device)


def stream_model(config: Config, folder: Path, layers: int) -> dict[str, Any]:
    """The same layer by layer, from the checkpoint's files to those of the converted one."""
    if config.model.dtype not in (Dtype.auto, Dtype.native):
        raise ValueError(
            f"model.dtype={config.model.dtype.value}: layer by layer a checkpoint keeps its dtype; use auto"
        )
    source = checkpoint_folder(config)
    tokenizer, device = load_tokenizer(source), pick_device(config.launch.device)
    calibration, heldout = list(calibration_batches(config, tokenizer)), list(heldout_batches(config, tokenizer))
    print(f"convert: layer by layer from {source}", flush=True)
    options, mla = ConversionOptions.from_config(config.mla), config.mla
    with native_autocast(device), layer_progress(layers, "converted") as on_layer:
        found = convert_streamed(
            source,
            folder,
            options,
            calibration,
            heldout,
            mla.reconstruction_steps,
            mla.reconstruction_learning_rate,
            device,
            on_layer,
            forget=False,
        )
    assert found.comparison is not None
    report = found.report
    print(f"convert: {summary(report.cache_size, report.original_cache_size, report.reduction)}", flush=True)
    tokenizer.save_pretrained(folder)
    fits, comparison = [asdict(fit) for fit in found.fits], asdict(found.comparison)
    write_json(folder / "conversion.json", report.to_dict() | {"reconstruction": fits, "comparison": comparison})
    tokens = sum(batch.numel() for batch in calibration)
    return metrics(report, found.comparison, tokens, torch.device(device))


def checkpoint_folder(config: Config) -> Path:
    """The folder of the checkpoint's files, fetched from the hub if need be."""
    source = local_model(config)
    if Path(source).is_dir():
        return Path(source)
    wanted = ["*.json", "*.safetensors", "tokenizer*", "*.jinja", "*.model", "*.txt"]
    return Path(snapshot_download(source, revision=config.model.revision, allow_patterns=wanted))


def is_streamed(config: Config, pretrained: Any, folder: Path) -> bool:
    """Whether to convert layer by layer: as told, else if that was begun, or where both models would take most of the
    free memory."""
    if config.launch.streamed is not Streamed.auto:
        return config.launch.streamed is Streamed.on
    if (folder / STATE / PROGRESS).exists():
        return True
    sizes, device = sizes_of(pretrained), pick_device(config.launch.device)
    dtype = torch_dtype(config.model.dtype, device == "cpu", stored="auto")
    both = 2 * sizes.total * (sizes.stored if dtype == "auto" else dtype.itemsize)
    free = torch.cuda.mem_get_info()[0] if device == "cuda" else psutil.virtual_memory().available
    return both > MOST * free


def metrics(report: ConversionReport, comparison: Comparison, tokens: int, device: torch.device) -> dict[str, Any]:
    """What the stage's record keeps, and the line that says how far conversion alone comes."""
    print(
        f"convert: perplexity {comparison.perplexity_original:.2f} -> {comparison.perplexity_converted:,.2f} "
        f"before healing ({comparison.tokens:,} held-out tokens)",
        flush=True,
    )
    return {
        "cache_size": report.cache_size,
        "original_cache_size": report.original_cache_size,
        "reduction": report.reduction,
        "calibration_tokens": tokens,
        "peak_memory_gib": peak_memory_gib(device),
        **asdict(comparison),
    }


def fit_layers(model: Any, converted: Any, calibration: list[torch.Tensor], config: Config) -> list[dict[str, float]]:
    """Layer-wise reconstruction on the calibration text."""
    mla = config.mla
    with layer_progress(model.config.num_hidden_layers, "reconstructed") as on_layer:
        fits = reconstruct(
            model, converted, calibration, mla.reconstruction_steps, mla.reconstruction_learning_rate, on_layer
        )
    return [asdict(fit) for fit in fits]


@contextmanager
def layer_progress(layers: int, done: str) -> Iterator[Callable[[int, LayerFit], None]]:
    """A bar over layers on a terminal, a line every ten layers elsewhere."""
    with tqdm(total=layers, desc=done, unit="layer", disable=None) as bar:

        def on_layer(index: int, _: LayerFit) -> None:
            bar.update()
            if bar.disable and (index + 1) % 10 == 0:
                print(f"convert: {index + 1} of {layers} layers {done}", flush=True)

        yield on_layer


def summary(size: float, original: int, reduction: float) -> str:
    return f"{size:g} numbers a token a layer instead of {original} (-{100 * reduction:.2f} %)"


@stage_main
def run(config: Config) -> None:
    stage = Plan(config).convert
    if stage.skip(config.force):
        return
    pretrained = pretrained_config(config)
    streamed = is_streamed(config, pretrained, stage.folder)
    with stage.run(resumable=streamed, force=config.force):
        if streamed:
            stage.metrics |= stream_model(config, stage.folder, pretrained.num_hidden_layers)
        else:
            stage.metrics |= convert_model(config, stage.folder)
    forget_progress(stage.folder)  # only now: the stage is sealed


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    run(cfg)


if __name__ == "__main__":
    main()
