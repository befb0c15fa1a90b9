"""Heal a converted model by training it on the sampled data.

    python -m train.finetune                                              one process, GPU or CPU
    accelerate launch --num_processes 8 -m train.finetune                 eight GPUs
    torchrun --nproc_per_node 2 -m train.finetune launch.device=cpu       two CPU processes

One, two or many processes give the same training, and so does one that was killed and started again: every
optimiser step takes a fixed set of sequences (train/batches.py), its loss is divided by the number of target
tokens of them all, dropout is seeded per micro-batch, and checkpoints hold the rest (train/checkpoint.py).

The folder of the stage ends up as an ordinary checkpoint of the converted model's class and dtype, with
`history.json` beside it.
"""

import functools
import logging
import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import hydra
import torch
import transformers
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from omegaconf import DictConfig
from torch import nn

from conf.errors import stage_main
from conf.memory import peak_memory_gib
from conf.plan import Plan, plain, teacher_fingerprint
from conf.pretrained import load_config, load_tokenizer
from conf.schema import Config, FinetuneConfig, Sharding
from conf.tracking import Tracker, open_run
from data.tokens import check_ids
from data.windows import text_windows
from mha2mla.output_head import perplexity_of, rows_of, token_losses
from train.batches import PackedRows, TextRows, TrainingOrder, micro_batch, mix_seed
from train.checkpoint import Progress, checkpoints, load_checkpoint, save_checkpoint, without_wrappers
from train.launch import start
from train.losses import check_loss, loss_function
from train.model import save_model, trainable_model
from train.progress import Display
from train.schedule import learning_rate_factor
from train.sharding import ShardedStates, WholeStates, accumulating, clip, prepare
from train.stored_teacher import StoredTeacher, stored_teacher
from train.targets import IGNORE, forward
from train.teacher import check_teacher, load_teacher

Log = Callable[[dict[str, float], int], Any]  # values by name, step


def finetune(
    model_dir: Path,
    data_dir: Path,
    output: Path,
    config: FinetuneConfig,
    accelerator: Accelerator,
    log: Log | None = None,
    teacher: nn.Module | None = None,
    text: TextRows | None = None,
    stored: Callable[[PackedRows, nn.Module], StoredTeacher] | None = None,
    sharding: Sharding = Sharding.none,
) -> dict[str, Any]:
    """Train the checkpoint in `model_dir` on the shards in `data_dir`; write the result into `output`.

    `teacher` is the frozen model that a loss of distillation learns from (train/teacher.py), on the device.
    `stored` makes or finds what a loss learns from instead (train/stored_teacher.py), for training rows and model.
    `sharding` is how the processes share the model (train/sharding.py).
    `text` is another text whose perplexity is measured whenever validation is.
    Called by every process alike. Continues from the last checkpoint in `output/checkpoints` if there is one.
    Returns the metrics of the run. Raises ValueError for settings that cannot work, before training starts.
    """
    check_settings(config, accelerator.num_processes)
    loss_of = loss_function(config, teacher)

    # Model and data. The same seed everywhere: new weights (LoRA) must start alike on all processes.
    set_seed(config.seed)
    model: Any = trainable_model(model_dir, config)
    if teacher is not None:
        check_teacher(teacher, model, config.loss)
    vocab_size = model.get_input_embeddings().weight.shape[0]
    with accelerator.local_main_process_first():
        train_rows = PackedRows(data_dir, "train", vocab_size)
        validation_rows = PackedRows(data_dir, "validation", vocab_size)
    teachings = stored(train_rows, model) if stored else None
    order = TrainingOrder(len(train_rows), config.global_batch_size, config.epochs, config.seed)
    steps = number_of_steps(config, order, train_rows)

    # What is trained, and how.
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parameters = sum(parameter.numel() for parameter in model.parameters())
    trained_parameters = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    betas = (config.adam_beta1, config.adam_beta2)

    def make_optimizer(model: nn.Module) -> torch.optim.Optimizer:
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        return torch.optim.AdamW(trained, config.learning_rate, betas, weight_decay=config.weight_decay)

    model, optimizer = prepare(accelerator, model, make_optimizer, sharding)
    without_wrappers(accelerator)
    states = ShardedStates(model, optimizer) if sharding is Sharding.fsdp2 else WholeStates(accelerator, sharding)
    progress = load_checkpoint(states, output / "checkpoints")

    display = Display(steps, progress.step, shown=accelerator.is_main_process)
    display.line(
        f"finetune: {trained_parameters / 1e6:.1f} of {parameters / 1e6:.1f} M parameters, {steps} steps of "
        f"{config.global_batch_size} x {train_rows.length} tokens\n"
        f"          on {accelerator.num_processes} x {accelerator.device.type}, precision {accelerator.mixed_precision}"
        + (f", going on after step {progress.step}" if progress.step else "")
    )

    def record(row: dict[str, float], group: str) -> None:
        """A new row of the history: to disk, and to the tracker."""
        if accelerator.is_main_process:
            progress.write_history(output / "history.json")
            if log:
                log({f"{group}/{name}": value for name, value in row.items() if name != "step"}, progress.step)

    def validate() -> None:
        number = max(1, config.eval_tokens // validation_rows.length)
        loss = validation_loss(accelerator, model, validation_rows, number, config.micro_batch_size, display)
        check_validation(progress, loss, "validation text", output / "checkpoints")
        row = progress.log_validation(loss, perplexity_of(loss))
        shown = f"step {progress.step}/{steps}  validation perplexity {row['perplexity']:.3f}"
        if text is not None:
            loss = validation_loss(accelerator, model, text, len(text), config.micro_batch_size, display)
            check_validation(progress, loss, text.name, output / "checkpoints")
            row["text_perplexity"] = perplexity_of(loss)
            shown += f", {text.name} {row['text_perplexity']:.3f}"
        record(row, "validation")
        display.line(shown)

    if not progress.validation:
        validate()
    model.train()
    for step in range(progress.step, steps):
        began = time.perf_counter()
        lr = config.learning_rate * learning_rate_factor(step, steps, config.warmup_fraction, config.decay_fraction)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # The whole global batch, the same on every process; each trains on every n-th micro-batch of it.
        batch = train_rows.batch(order.rows(step))
        if teachings:
            batch |= teachings.batch(order.rows(step))
        targets = max(int((batch["labels"] != IGNORE).sum()), 1)
        micro_batches = config.global_batch_size // config.micro_batch_size
        mine = range(accelerator.process_index, micro_batches, accelerator.num_processes)
        loss_sum = torch.zeros((), device=accelerator.device)
        for index in mine:
            torch.manual_seed(mix_seed(config.seed, step, index))  # dropout follows the data, not the process
            micro = micro_batch(batch, index, config.micro_batch_size, accelerator.device)
            # Gradients are averaged over the processes: hence their number.
            with accumulating(accelerator, model, last=index == mine[-1]):
                loss, _ = loss_of(model, micro)
                accelerator.backward(loss * accelerator.num_processes / targets)
            loss_sum += loss.detach()
            display.note(f"step {step + 1}/{steps}, micro-batch {index + 1} of {micro_batches}")
        grad_norm = clip(accelerator, model, config.max_grad_norm)
        total = float(accelerator.reduce(loss_sum, "sum"))
        check_finite(progress, total / targets, grad_norm, accelerator.mixed_precision, output / "checkpoints")
        optimizer.step()
        optimizer.zero_grad()

        tokens, seconds = batch["input_ids"].numel(), time.perf_counter() - began
        progress.add(total, targets, tokens, seconds)
        done = step + 1
        row = progress.log_train(lr, grad_norm) if done % config.log_every == 0 or done == steps else None
        if row:
            record(row, "train")
        display.step(done, row, total / targets, tokens / seconds)
        if done % config.eval_every == 0 or done == steps:
            validate()
        if done % config.save_every == 0:
            save_checkpoint(accelerator, states, progress, output / "checkpoints", config.keep_checkpoints)
    display.line(f"finetune: writing the model into {output}")
    display.close()

    save_model(accelerator, model, model_dir, output, config)
    perplexities = [row["perplexity"] for row in progress.validation]
    if not perplexities[-1] <= perplexities[0]:
        display.line(
            f"finetune: warning: training made the model worse, validation perplexity {perplexities[0]:.3f} -> "
            f"{perplexities[-1]:.3f};\n          lower finetune.learning_rate ({config.learning_rate:g})"
        )
    return {
        "steps": progress.step,
        "tokens": progress.tokens,
        "train_loss": progress.train[-1]["loss"],
        "validation_perplexity_start": perplexities[0],
        "validation_perplexity": perplexities[-1],
        "validation_perplexity_best": min(perplexities),
        "train_seconds": round(progress.seconds, 1),
        "tokens_per_second": round(progress.tokens / progress.seconds, 1),
        "peak_memory_gib": peak_memory_gib(accelerator.device),
        "parameters": parameters,
        "trained_parameters": trained_parameters,
        "processes": accelerator.num_processes,
        "device": accelerator.device.type,
        "mixed_precision": accelerator.mixed_precision,
    }


def check_settings(config: FinetuneConfig, processes: int) -> None:
    """What can be said without model and data."""
    check_loss(config.loss)
    share = config.micro_batch_size * processes
    if config.global_batch_size % share:
        raise ValueError(
            f"finetune.global_batch_size={config.global_batch_size} must be a multiple of finetune.micro_batch_size="
            f"{config.micro_batch_size} x {processes} processes (launch.num_processes), that is of {share}"
        )


def number_of_steps(config: FinetuneConfig, order: TrainingOrder, rows: PackedRows) -> int:
    """`finetune.max_steps`, or all that the data give."""
    steps = len(order) if config.max_steps is None else config.max_steps
    if not 1 <= steps <= len(order):
        raise ValueError(
            f"finetune.max_steps={config.max_steps}, but {len(rows)} sequences of {rows.length} tokens x "
            f"finetune.epochs={config.epochs} give {len(order)} steps of finetune.global_batch_size="
            f"{config.global_batch_size}; change one of these, or sample more data (data.tokens)"
        )
    return steps


def check_finite(progress: Progress, loss: float, grad_norm: float, mixed_precision: str, folder: Path) -> None:
    """Stop before a broken step reaches the weights (in fp16 the gradient scaler skips overflowing steps itself)."""
    if not math.isfinite(loss) or (not math.isfinite(grad_norm) and mixed_precision != "fp16"):
        found = f"in step {progress.step + 1} (loss {loss}, gradient norm {grad_norm})"
        if not progress.step:
            raise ValueError(f"training cannot begin {found}: numbers of the model or of its teacher are not finite")
        raise ValueError(
            f"training diverged {found}; lower finetune.learning_rate or raise finetune.warmup_fraction; "
            + last_checkpoint(folder)
        )


def check_validation(progress: Progress, loss: float, name: str, folder: Path) -> None:
    """Stop where a loss of validation is no number: before training the model is broken, later the training."""
    if not math.isfinite(loss):
        raise ValueError(
            f"the model's loss on {name} is {loss} after {progress.step} steps: "
            + (
                "its weights or activations are not finite; make it again with `make convert ARGS=force=true`, in "
                "bfloat16 or float32 (model.dtype)"
                if not progress.step
                else f"training diverged; {last_checkpoint(folder)}"
            )
        )


def last_checkpoint(folder: Path) -> str:
    """What a training that is started again goes on from."""
    found = checkpoints(folder)
    return f"the last checkpoint is {found[-1]}" if found else "there is no checkpoint yet"


@torch.no_grad()
def validation_loss(
    accelerator: Accelerator, model: nn.Module, rows: PackedRows | TextRows, number: int, size: int, display: Display
) -> float:
    """Mean cross-entropy in nats over the first `number` rows, `size` at once on each process."""
    number = min(len(rows), number)
    rank, processes = accelerator.process_index, accelerator.num_processes
    sums = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    model.eval()
    for first in range(0, number, size * processes):
        mine = list(range(number))[first + rank * size : first + (rank + 1) * size]
        batch = rows.batch(mine or [0])
        if not mine:  # all processes must call a sharded model equally often
            batch["labels"].fill_(IGNORE)
        batch = micro_batch(batch, 0, size, accelerator.device)
        labels, logits = batch["labels"].flatten(), forward(model, batch).logits
        loss = token_losses(rows_of(logits), labels).double().sum()
        sums += torch.stack([loss, torch.count_nonzero(labels != IGNORE)])
        display.note(f"validation: {min(first + size * processes, number)} of {number} sequences")
    model.train()
    loss, targets = accelerator.reduce(sums, "sum").tolist()
    return loss / max(targets, 1)


def text_rows(config: Config, model_dir: Path) -> TextRows | None:
    """The text that evaluation will measure, for a curve of it over the training; None if there is none."""
    settings = config.eval
    if not settings.perplexity_text:
        return None
    tokenizer = load_tokenizer(model_dir)
    file = Path(settings.perplexity_text).expanduser()
    windows = text_windows(tokenizer, file, settings.perplexity_sequence_length, settings.perplexity_tokens)
    check_ids(f"eval.perplexity_text={file}", windows, tokenizer, load_config(model_dir))
    return TextRows(file.stem, torch.stack(windows))


def stored_rows(
    config: Config, plan: Plan, accelerator: Accelerator, rows: PackedRows, model: nn.Module
) -> StoredTeacher:
    """The teacher's likeliest tokens for these rows; the teacher is loaded only where nothing is stored."""

    def load() -> nn.Module:
        teacher = load_teacher(config, accelerator)
        assert teacher is not None
        check_teacher(teacher, model, config.finetune.loss)
        return teacher

    key = {"sample": plan.sample.key, "precision": accelerator.mixed_precision} | teacher_fingerprint(config)
    return stored_teacher(plan.sample.folder, rows, config.finetune, key, load, accelerator)


def run(config: Config) -> None:
    """The stage: what it needs must be finished, and it is not run again if it is."""
    plan = Plan(config)
    plan.convert.require_finished()
    plan.sample.require_finished()
    accelerator = start(config.finetune, config.launch)
    main = accelerator.is_main_process
    if plan.finetune.record() and not config.force:
        if main:
            plan.finetune.skip()
        return
    check_settings(config.finetune, accelerator.num_processes)
    top_k = config.finetune.teacher_top_k
    if main:
        print("finetune: loading models and data", flush=True)
    teacher = None if top_k else load_teacher(config, accelerator)
    accelerator.wait_for_everyone()  # every process has looked before the main one changes the folder
    with plan.finetune.run(resumable=True, force=config.force, main=main) as stage:
        accelerator.wait_for_everyone()
        settings = {"finetune": plain(config.finetune), "launch": plain(config.launch)}
        if main:
            print(yaml.safe_dump(settings, sort_keys=False), flush=True)
        with open_run(config, stage, settings) if main else nullcontext(Tracker(stage.name)) as tracker:
            stage.metrics |= finetune(
                plan.convert.folder,
                plan.sample.folder,
                stage.folder,
                config.finetune,
                accelerator,
                lambda values, step: tracker.do(lambda run: run.log(values, step=step)),
                teacher,
                text_rows(config, plan.convert.folder),
                functools.partial(stored_rows, config, plan, accelerator) if top_k else None,
                config.launch.sharding,
            )
            tracker.do(lambda run: run.summary.update(stage.metrics))
    accelerator.end_training()


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.getLogger("accelerate").setLevel(logging.ERROR)  # it tells of every file of every checkpoint
    stage_main(run)(cfg)


if __name__ == "__main__":
    main()
