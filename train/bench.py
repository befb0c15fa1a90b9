"""Time and memory of a training step with every loss, as ratios to cross-entropy in one run.

    python -m train.bench experiment=laptop
    python -m train.bench bench.train_compile=true

The model is the configuration's, converted without healing; a step is one micro-batch of
`finetune.micro_batch_size` x `data.sequence_length` random tokens. Every loss runs in fresh processes, for its own
peak of memory, and the losses take turns, so that a busy machine slows them alike; `bench.train_compile` adds
cross-entropy under torch.compile. Writes `outputs/<model>/train_bench.json`.

Model FLOPs utilisation (MFU) is the arithmetic of the student's products, forward and backward, as torch's FLOP
counter counts it, over what a large product in the same precision reaches in the same run.

Memory is what a training adds to its prepared model and optimiser: the teacher's weights, optimiser state, gradients,
activations, logits. Of the process on a CPU, of torch's allocator on CUDA.
"""

import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
from accelerate import Accelerator
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from torch.utils.flop_counter import FlopCounterMode

from conf.errors import stage_main
from conf.memory import held_bytes, peak_bytes
from conf.plan import plain, write_result
from conf.progress import counted
from conf.schema import Config
from conf.stage import provenance
from conf.timing import seconds_of
from mha2mla import ConversionOptions, collect_statistics, convert
from train.batches import next_tokens
from train.convert import load_pretrained, pretrained_config
from train.launch import start
from train.losses import LOSSES, loss_function
from train.model import trainable_model
from train.targets import Batch
from train.teacher import load_teacher

GIB = 2**30
COMPILED = "ce, compiled"


def measure(config: Config) -> dict[str, Any]:
    """Median seconds a step, memory in GiB and the ratios of both to cross-entropy, by loss."""
    variants = [*LOSSES, COMPILED] if config.bench.train_compile else list(LOSSES)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    memory: dict[str, list[float]] = {name: [] for name in variants}
    facts: dict[str, Any] = {}
    turns = [name for _ in range(config.bench.train_rounds) for name in variants]
    with tempfile.TemporaryDirectory() as folder:
        print("bench: converting the original", flush=True)
        alone(write_converted, config, folder)
        for name in counted(turns, "bench", "trainings"):
            found = alone(train, config, folder, name)
            seconds[name] += found.pop("seconds")
            memory[name].append(found.pop("memory_gib"))
            facts |= found
    step = {name: statistics.median(seconds[name]) for name in variants}
    held = {name: statistics.median(memory[name]) for name in variants}
    tokens = config.finetune.micro_batch_size * config.data.sequence_length
    rows = {
        name: {
            "seconds_per_step": step[name],
            "tokens_per_second": tokens / step[name],
            "mfu": facts["flops_per_step"] / step[name] / facts["matrix_flops_per_second"],
            "time_against_ce": step[name] / step["ce"],
            "memory_gib": held[name],
            "memory_against_ce": held[name] / held["ce"],
        }
        for name in variants
    }
    return {
        "model": config.model.name,
        "tokens": [config.finetune.micro_batch_size, config.data.sequence_length],
        "trainable": config.finetune.trainable.value,
        "bench": {name: value for name, value in plain(config.bench).items() if name.startswith("train_")},
        **facts,
        "losses": rows,
        "provenance": provenance(),
    }


def alone(function: Any, *arguments: Any) -> Any:
    """The function's result, from a process that has done nothing before."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        return process.submit(function, *arguments).result()


def write_converted(config: Config, folder: str) -> None:
    transformers.utils.logging.disable_progress_bar()
    pretrained_config(config)
    model = load_pretrained(config)
    # Any text will do: how fast a step is does not depend on what the weights are.
    statistics = collect_statistics(model, [torch.arange(64)[None]])
    converted, _ = convert(model, ConversionOptions.from_config(config.mla).by_rank(), statistics)
    converted.save_pretrained(folder)


def train(config: Config, folder: str, name: str) -> dict[str, Any]:
    """Seconds of each timed step with the loss `name`, and the memory they took beyond the prepared model."""
    transformers.utils.logging.disable_progress_bar()
    config.finetune.loss, config.finetune.torch_compile = name.split(",")[0], name == COMPILED
    accelerator = start(config.finetune, config.launch)
    model: Any = trainable_model(Path(folder), config.finetune)
    batch = random_batch(config, model, accelerator.device)
    if config.finetune.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-4)
    model, optimizer = accelerator.prepare(model, optimizer)
    before = held_bytes(accelerator.device)
    loss_of = loss_function(config.finetune, load_teacher(config, accelerator))
    model.train()

    def step() -> None:
        loss, targets = loss_of(model, batch)
        accelerator.backward(loss / targets)
        optimizer.step()
        optimizer.zero_grad()

    facts: dict[str, Any] = {"device": accelerator.device.type, "mixed_precision": accelerator.mixed_precision}
    with FlopCounterMode(display=False) if name == "ce" else nullcontext() as counter:
        step()  # warms up, compiles
    if counter:
        facts["flops_per_step"] = counter.get_total_flops()
    seconds = [seconds_of(step, accelerator.device) for _ in range(config.bench.train_steps)]
    facts |= {"seconds": seconds, "memory_gib": (peak_bytes(accelerator.device) - before) / GIB}
    if counter:
        facts["matrix_flops_per_second"] = matrix_rate(accelerator)
    return facts


def matrix_rate(accelerator: Accelerator) -> float:
    """FLOP/s of a square product of random matrices in the precision of training; the best of five."""
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}
    dtype = half.get(accelerator.mixed_precision, torch.float32)
    size = 8192 if accelerator.device.type == "cuda" else 2048
    left, right = (torch.randn(size, size, device=accelerator.device).to(dtype) for _ in range(2))
    seconds = [seconds_of(lambda: left @ right, accelerator.device) for _ in range(6)]
    return 2 * size**3 / min(seconds[1:])


def random_batch(config: Config, model: Any, device: torch.device) -> Batch:
    shape = config.finetune.micro_batch_size, config.data.sequence_length
    tokens = torch.randint(model.get_input_embeddings().weight.shape[0], shape)
    positions = torch.arange(shape[1]).expand(shape)
    batch = {"input_ids": tokens, "position_ids": positions, "labels": next_tokens(tokens, positions)}
    return {name: rows.to(device) for name, rows in batch.items()}


def show(result: dict[str, Any]) -> None:
    rows, length = result["tokens"]
    table = Table(title=f"step: {rows} x {length} tokens, {result['trainable']}, precision {result['mixed_precision']}")
    for heading in ("loss", "s a step", "time", "tokens/s", "MFU", "memory GiB", "memory"):
        table.add_column(heading, justify="left" if heading == "loss" else "right")
    for name, row in result["losses"].items():
        table.add_row(
            name,
            f"{row['seconds_per_step']:.3f}",
            f"{row['time_against_ce']:.2f}x",
            f"{row['tokens_per_second']:,.0f}",
            f"{100 * row['mfu']:.0f} %",
            f"{row['memory_gib']:.2f}",
            f"{row['memory_against_ce']:.2f}x",
        )
    Console(width=80).print(table)


def run(config: Config) -> None:
    result = measure(config)
    show(result)
    write_result(config, "train_bench", result)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    stage_main(run)(cfg)


if __name__ == "__main__":
    main()
