"""Stage `convert`: the pretrained model becomes one with latent attention.

    python -m train.convert model=from_path model.path=org/name mla.kv_lora_rank=64

Writes a checkpoint that loads by itself, and `conversion.json`: what was asked for, what each layer lost, and the
perplexity of original and converted model on text that no later stage trains on.
"""

from dataclasses import asdict
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from omegaconf import DictConfig
from tqdm import tqdm
from transformers import AutoConfig, AutoTokenizer

from conf.errors import stage_main
from conf.memory import peak_memory_gib
from conf.models import local_model
from conf.plan import Plan
from conf.precision import native_autocast, torch_dtype
from conf.schema import Config, Device
from conf.stage import write_json
from data.calibration import calibration_batches, heldout_batches
from mha2mla import ConversionOptions, collect_statistics, convert, reconstruct, resolve_options
from mha2mla.compare import compare
from mha2mla.reconstruct import LayerFit
from train.checkpoint import appearing_in
from train.launch import NO_CUDA
from train.model import load_model


def load_pretrained(config: Config) -> tuple[Any, Any]:
    """The original model on the device that conversion runs on, and its tokenizer; checks the options first."""
    source = local_model(config)
    try:
        pretrained = AutoConfig.from_pretrained(source, revision=config.model.revision)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"model.path={config.model.path} cannot be loaded ({reason}); "
            "give a hub id such as org/name that this machine can reach, or a local checkpoint folder"
        ) from error
    resolve_options(pretrained, ConversionOptions.from_config(config.mla))
    if config.launch.device is Device.cuda and not torch.cuda.is_available():
        raise ValueError(NO_CUDA)
    tokenizer = AutoTokenizer.from_pretrained(source, revision=config.model.revision)
    on_gpu = config.launch.device is not Device.cpu and torch.cuda.is_available()
    dtype = torch_dtype(config.model.dtype, not on_gpu, stored="auto")
    model = load_model(source, dtype, "get that checkpoint again", revision=config.model.revision)
    return model.to("cuda" if on_gpu else "cpu").eval(), tokenizer


def convert_model(config: Config, folder: Path) -> dict[str, Any]:
    """Convert, measure and save into `folder`; returns the stage's metrics."""
    model, tokenizer = load_pretrained(config)
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
    print(
        f"convert: perplexity {comparison.perplexity_original:.2f} -> {comparison.perplexity_converted:,.2f} "
        f"before healing ({comparison.tokens:,} held-out tokens)",
        flush=True,
    )
    return {
        "cache_size": report.cache_size,
        "original_cache_size": report.original_cache_size,
        "reduction": report.reduction,
        "calibration_tokens": statistics.tokens,
        "peak_memory_gib": peak_memory_gib(model.device),
        **asdict(comparison),
    }


def fit_layers(model: Any, converted: Any, calibration: list[torch.Tensor], config: Config) -> list[dict[str, float]]:
    """Layer-wise reconstruction on the calibration text."""
    fits: list[dict[str, float]] = []
    layers = model.config.num_hidden_layers
    with tqdm(total=layers, desc="reconstruct", unit="layer", disable=None) as bar:

        def on_layer(index: int, fit: LayerFit) -> None:
            fits.append(asdict(fit))
            bar.update()
            if bar.disable and (index + 1) % 10 == 0:
                print(f"convert: {index + 1} of {layers} layers reconstructed", flush=True)

        mla = config.mla
        reconstruct(model, converted, calibration, mla.reconstruction_steps, mla.reconstruction_learning_rate, on_layer)
    return fits


def summary(size: float, original: int, reduction: float) -> str:
    return f"{size:g} numbers a token a layer instead of {original} (-{100 * reduction:.2f} %)"


@stage_main
def run(config: Config) -> None:
    stage = Plan(config).convert
    if stage.skip(config.force):
        return
    with stage.run(force=config.force):
        stage.metrics |= convert_model(config, stage.folder)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    run(cfg)


if __name__ == "__main__":
    main()
