"""Checkpoints of a running fine-tuning: `checkpoints/step-000020`, complete or not there at all.

Weights, optimiser and gradient scaler are saved and loaded by train/sharding.py; `progress.json` beside them holds the
position in the data and the history so far. A checkpoint is written under a temporary name and renamed when
whole, so a process killed at any moment finds the last whole one. The schedule is a function of the step.
"""

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol

from accelerate import Accelerator
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException

from conf.stage import TEMPORARY, appearing, write_json
from mha2mla.shards import plain_permissions

PROGRESS_FILE = "progress.json"


class States(Protocol):
    """Saves and loads all that is a tensor; called by every process."""

    sharding: str

    def save(self, folder: Path) -> None: ...

    def load(self, folder: Path) -> None: ...


@dataclass
class Progress:
    """Where training stands, and its history: all that is not a tensor. Saved with every checkpoint."""

    step: int = 0
    sharding: str = "none"  # how the tensors beside it are kept
    tokens: int = 0  # input tokens seen, over all processes
    seconds: float = 0.0  # spent in training steps, over all restarts
    train: list[dict[str, float]] = field(default_factory=list)  # one row per `log_every` steps
    validation: list[dict[str, float]] = field(default_factory=list)
    # Sums since the last row of `train`:
    window_loss: float = 0.0
    window_targets: int = 0
    window_tokens: int = 0
    window_seconds: float = 0.0

    def add(self, loss_sum: float, targets: int, tokens: int, seconds: float) -> None:
        """Count one optimiser step."""
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.window_loss += loss_sum
        self.window_targets += targets
        self.window_tokens += tokens
        self.window_seconds += seconds

    def log_train(self, lr: float, grad_norm: float) -> dict[str, float]:
        """A new row: mean loss and tokens/s since the row before, rate and gradient norm of this step."""
        row = {
            "step": self.step,
            "tokens": self.tokens,
            "loss": self.window_loss / max(self.window_targets, 1),
            "lr": lr,
            "grad_norm": grad_norm,
            "tokens_per_second": round(self.window_tokens / self.window_seconds, 1),
        }
        self.window_loss = self.window_seconds = 0.0
        self.window_targets = self.window_tokens = 0
        self.train.append(row)
        return row

    def log_validation(self, loss: float, perplexity: float) -> dict[str, float]:
        row = {"step": self.step, "tokens": self.tokens, "loss": loss, "perplexity": perplexity}
        self.validation.append(row)
        return row

    def write_history(self, path: Path) -> None:
        write_json(path, {"train": self.train, "validation": self.validation})


@contextmanager
def appearing_in(folder: Path) -> Iterator[Path]:
    """A temporary folder whose files move into `folder` when all are written, `config.json`, without which nothing
    loads a checkpoint, last."""
    whole = folder / "saving"
    with appearing(whole) as temporary:
        yield temporary
        plain_permissions(temporary)
    for file in sorted(whole.iterdir(), key=lambda file: file.name == "config.json"):
        file.replace(folder / file.name)
    whole.rmdir()


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d+", path.name)]
    return sorted(found, key=lambda path: int(path.name.split("-")[1]))


def save_checkpoint(accelerator: Accelerator, states: States, progress: Progress, folder: Path, keep: int) -> None:
    """Write `folder/step-<step>` and drop all but the newest `keep`. Called by every process."""
    target = folder / f"step-{progress.step:06d}"
    with appearing(target) if accelerator.is_main_process else others(target) as temporary:
        accelerator.wait_for_everyone()
        states.save(temporary)
        accelerator.wait_for_everyone()
        progress.sharding = states.sharding
        if accelerator.is_main_process:
            write_json(temporary / PROGRESS_FILE, asdict(progress))
            plain_permissions(temporary)
    if accelerator.is_main_process:
        for old in [*checkpoints(folder)[:-keep], *folder.glob(f"step-*{TEMPORARY}")]:
            # Renamed before it is emptied: a half-removed checkpoint must not bear a whole one's name.
            shutil.rmtree(old if old.suffix == TEMPORARY else old.rename(f"{old}{TEMPORARY}"))
    accelerator.wait_for_everyone()


@contextmanager
def others(folder: Path) -> Iterator[Path]:
    """What `appearing` is on the main process, for those that only write their part into the folder."""
    yield folder.with_name(folder.name + TEMPORARY)


def load_checkpoint(states: States, folder: Path) -> Progress:
    """Bring prepared model and optimiser to the last whole checkpoint; a fresh `Progress` if there is none."""
    found = checkpoints(folder)
    if not found:
        return Progress()
    try:
        progress = Progress(**json.loads((found[-1] / PROGRESS_FILE).read_text()))
        if progress.sharding != states.sharding:
            raise ValueError(
                f"it was written with launch.sharding={progress.sharding}, this is launch.sharding={states.sharding}"
            )
        states.load(found[-1])
        return progress
    except (Exception, CheckpointException) as error:  # torch's own is no Exception
        reason = " ".join(str(error).split())[:240]
        raise ValueError(f"cannot resume from {found[-1]} ({reason}); remove that folder and start again") from error


def without_wrappers(accelerator: Accelerator) -> None:
    """Save and load the bare model's names, so that one process continues what two began and the reverse.

    Accelerate would save what DistributedDataParallel calls the weights. DeepSpeed has a format of its own and comes
    here with empty lists.
    """

    def bare(model: nn.Module) -> nn.Module:
        return accelerator.unwrap_model(model, keep_torch_compile=False)

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        weights[:] = [bare(model).state_dict() for model, _ in zip(models, weights, strict=False)]

    def load(models: list[nn.Module], folder: str) -> None:
        models[:] = [bare(model) for model in models]

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(load)
