"""Stage `convert`: the pretrained model becomes one with latent attention.

    python -m train.convert model=from_path model.path=org/name mla.kv_lora_rank=64

Writes a checkpoint that loads by itself, and `conversion.json`: what was asked for, what each layer lost, and the
perplexity of original and converted model on text that no later stage trains on.
"""

import copy
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

from conf.checkpoint import NOT_OURS, load_model
from conf.devices import pick_device
from conf.errors import stage_main
from conf.memory import peak_memory_gib
from conf.models import local_model
from conf.plan import Plan
from conf.precision import Dtype, native_autocast, torch_dtype
from conf.pretrained import load_config, load_generation_config, load_tokenizer, skeleton
from conf.progress import Progress
from conf.schema import Config, Streamed
from conf.stage import write_json
from data.calibration import calibration_batches, heldout_batches
from data.tokens import check_ids
from mha2mla import (
    ConversionOptions,
    ConversionReport,
    collect_statistics,
    convert,
    reconstruct,
    resolve_options,
)
from mha2mla.channels import TOKENS
from mha2mla.compare import Comparison, compare
from mha2mla.families import attention_layers, family_of, latent_layers
from mha2mla.reconstruct import LayerFit
from mha2mla.streaming import PROGRESS, STATE, convert_streamed
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
    return load_model(local_model(config), dtype, NOT_OURS, config.model.revision, device)


def convert_model(config: Config, folder: Path) -> dict[str, Any]:
    """Convert, measure and save into `folder`; returns the stage's metrics."""
    print("convert: loading the original", flush=True)
    model = load_pretrained(config)
    tokenizer = load_tokenizer(local_model(config), config.model.revision)
    heldout, calibration = list(heldout_batches(config, tokenizer)), list(calibration_batches(config, tokenizer))
    check_ids("held-out data", heldout, tokenizer, model.config)
    check_ids("data for calibration", calibration, tokenizer, model.config)
    # Means over thousands of tokens do not need float32 products; the sums are float32 all the same.
    with native_autocast(model.device.type), over_tokens("statistics", calibration) as on_tokens:
        statistics = collect_statistics(model, calibration, on_tokens)
    with Progress("convert: factor", model.config.num_hidden_layers, "layers") as progress:
        options = ConversionOptions.from_config(config.mla)
        with format_progress(options) as on_tokens:
            on_layer = lambda _: progress.advance(1)  # noqa: E731
            converted, report = convert(model, options, statistics, on_layer, calibration, on_tokens)
    print(f"convert: {summary(report)}", flush=True)
    found = report.to_dict()
    if config.mla.reconstructions:
        comparison, fits = reconstructed(model, converted, calibration, heldout, config)
        found |= fits
    else:
        comparison = compared(model, converted, heldout)
    with appearing_in(folder) as whole:
        converted.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        write_json(whole / "conversion.json", found | {"comparison": asdict(comparison)})
    return metrics(report, comparison, statistics.tokens, model.device)


@contextmanager
def over_tokens(what: str, batches: list[torch.Tensor]) -> Iterator[Callable[[int], None]]:
    """Progress over the tokens of some batches."""
    with Progress(f"convert: {what}", sum(batch.numel() for batch in batches), "tokens") as progress:
        yield progress.advance


def compared(model: Any, converted: Any, heldout: list[torch.Tensor]) -> Comparison:
    with over_tokens("compare on held-out text", heldout) as on_tokens:
        return compare(model, converted, heldout, on_tokens)


def stream_model(config: Config, folder: Path, layers: int) -> dict[str, Any]:
    """The same layer by layer, from the checkpoint's files to those of the converted one."""
    if config.model.dtype not in (Dtype.auto, Dtype.native):
        raise ValueError(
            f"model.dtype={config.model.dtype.value}: layer by layer a checkpoint keeps its dtype; use auto"
        )
    print("convert: opening the original's files", flush=True)
    source = checkpoint_folder(config)
    tokenizer, device = load_tokenizer(source), pick_device(config.launch.device)
    calibration, heldout = list(calibration_batches(config, tokenizer)), list(heldout_batches(config, tokenizer))
    pretrained = load_config(source)
    check_ids("data for calibration", calibration, tokenizer, pretrained)
    check_ids("held-out data", heldout, tokenizer, pretrained)
    print(f"convert: layer by layer from {source}", flush=True)
    options, mla = ConversionOptions.from_config(config.mla), config.mla
    if options.bits != 16:
        raise ValueError(
            f"mla.bits={options.bits}: a conversion layer by layer cannot measure what the loss minds, which a cache "
            "format is chosen by; give launch.streamed=off, or mla.bits=16"
        )
    with native_autocast(device), layer_progress(layers, "converted") as on_layer:
        found = convert_streamed(
            source,
            folder,
            options,
            calibration,
            heldout,
            mla.reconstructions,
            mla.reconstruction_learning_rate,
            device,
            on_layer,
            forget=False,
        )
    assert found.comparison is not None
    report = found.report
    print(f"convert: {summary(report)}", flush=True)
    tokenizer.save_pretrained(folder)
    fits = described(found.fits, report.latent_layers) if mla.reconstructions else {}
    write_json(folder / "conversion.json", report.to_dict() | fits | {"comparison": asdict(found.comparison)})
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


def reconstructed(
    model: Any, converted: Any, calibration: list[torch.Tensor], heldout: list[torch.Tensor], config: Config
) -> tuple[Comparison, dict[str, Any]]:
    """Layer-wise reconstruction on the calibration text, taken back where the model as a whole is worse for it."""
    closed, mla = compared(model, converted, heldout), config.mla
    latent = latent_layers(converted)
    weights = [(layer, copy.deepcopy(layer.state_dict())) for _, layer in latent]
    steps, rate = mla.reconstructions, mla.reconstruction_learning_rate
    with native_autocast(model.device.type), layer_progress(len(attention_layers(model)), "reconstructed") as on_layer:
        fits = reconstruct(model, converted, calibration, steps, rate, on_layer)
    comparison = compared(model, converted, heldout)
    found = described(fits, [index for index, _ in latent])
    found |= {"comparison_before_reconstruction": asdict(closed), "reconstruction_kept": True}
    if comparison.kl_divergence <= closed.kl_divergence:
        return comparison, found
    print(
        "convert: reconstruction made the model as a whole worse on held-out text (divergence from the original "
        f"{closed.kl_divergence:.3f} -> {comparison.kl_divergence:.3f}): all layers keep their closed form",
        flush=True,
    )
    for layer, state in weights:
        layer.load_state_dict(state)
    return closed, found | {"reconstruction_kept": False}


def described(fits: list[LayerFit], latent: list[int]) -> dict[str, Any]:
    """The fits as the report has them, and a line that says which of the latent layers gained."""
    still = [str(index) for index in latent if not fits[index].rate]
    before, after = (sum(getattr(fits[index], side) for index in latent) / len(latent) for side in ("before", "after"))
    gained = len(latent) - len(still)
    print(
        f"convert: reconstruction lowered the error on held-out text in {gained} of {len(latent)} layers, "
        f"{before:.4f} -> {after:.4f} in the mean" + (f"; closed form kept in {', '.join(still)}" if still else ""),
        flush=True,
    )
    return {"reconstruction": [asdict(fit) for fit in fits], "layers_that_gained": gained}


@contextmanager
def layer_progress(layers: int, done: str) -> Iterator[Callable[[int, LayerFit], None]]:
    """Progress over layers."""
    with Progress(f"convert: {done}", layers, "layers") as progress:
        yield lambda index, fit: progress.advance(1)


@contextmanager
def format_progress(options: ConversionOptions) -> Iterator[Callable[[int], None] | None]:
    """Progress over the text that a cache format is chosen on, where there is one."""
    if options.bits == 16:
        yield None
        return
    with Progress("convert: cache format", TOKENS, "tokens") as progress:
        yield progress.advance


def summary(report: ConversionReport) -> str:
    size, original, context = report.cache_size, report.original_cache_size, report.options.context
    held = f"{size:g} numbers" if report.bits is None else f"{size:g} numbers in {report.bits:.0f} bits"
    counted = "" if report.bits is None else f" in bytes, all of {context} tokens counted"
    return f"{held} a token a layer instead of {original} of 16 bits (-{100 * report.reduction:.2f} %{counted})"


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


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    run(cfg)


if __name__ == "__main__":
    main()
