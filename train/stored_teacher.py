"""A teacher's likeliest tokens, stored once beside the data for several epochs or runs (`finetune.teacher_top_k`).

`data-<name>/teacher-<key>/` holds, for every token of the training rows, the k largest of the teacher's probabilities
and whose they are, in two memory-mapped arrays: 8 bytes for each. It is written by the main process of the first run
that wants it and is whole or not there. The loss compares the k tokens one by one and all the others as one.

Shapes: N training rows, B of them in a batch, T tokens, V vocabulary.
"""

from collections.abc import Callable
from pathlib import Path

import numpy
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from conf.progress import counted
from conf.schema import FinetuneConfig
from conf.stage import appearing, digest
from mha2mla.finite import is_finite
from mha2mla.output_head import chunks
from train.batches import PackedRows
from train.distillation import teach
from train.rowwise import RowLoss, sum_over_rows
from train.targets import IGNORE, Batch, Loss, forward


class StoredTeacher:
    """`.batch(indices)`: `teacher_tokens` int64 and `teacher_log_probabilities` float32, both [B, T, k]."""

    def __init__(self, folder: Path):
        self.tokens = numpy.load(folder / "tokens.npy", mmap_mode="r")
        self.log_probabilities = numpy.load(folder / "log_probabilities.npy", mmap_mode="r")

    def batch(self, indices: list[int]) -> Batch:
        return {
            "teacher_tokens": torch.from_numpy(self.tokens[indices].astype("int64")),
            "teacher_log_probabilities": torch.from_numpy(self.log_probabilities[indices]),
        }


def stored_teacher(
    data_dir: Path,
    rows: PackedRows,
    config: FinetuneConfig,
    key: dict[str, str],
    load: Callable[[], nn.Module],
    accelerator: Accelerator,
) -> StoredTeacher:
    """What is stored for these rows and this teacher; asks the teacher, which `load` brings, if nothing is yet.

    `key` says which teacher it is. Called by every process alike.
    """
    assert config.teacher_top_k is not None
    settings = {"top_k": config.teacher_top_k, "temperature": config.kd_temperature, "rows": len(rows)}
    folder = data_dir / f"teacher-{digest(key | settings)}"
    if not folder.exists():
        teacher = load()  # by all processes, which wait for each other there; only then may the folder appear
        if accelerator.is_main_process:
            with appearing(folder) as whole:
                write(whole, rows, config, teacher, accelerator)
    accelerator.wait_for_everyone()
    return StoredTeacher(folder)


def write(folder: Path, rows: PackedRows, config: FinetuneConfig, teacher: nn.Module, accelerator: Accelerator) -> None:
    assert config.teacher_top_k
    shape = (len(rows), rows.length, config.teacher_top_k)
    tokens = numpy.lib.format.open_memmap(folder / "tokens.npy", "w+", "uint32", shape)
    found = numpy.lib.format.open_memmap(folder / "log_probabilities.npy", "w+", "float32", shape)
    starts = range(0, len(rows), config.micro_batch_size)
    for first in counted(starts, "finetune: store the teacher", "batches"):
        indices = list(range(first, min(first + config.micro_batch_size, len(rows))))
        batch = {name: value.to(accelerator.device) for name, value in rows.batch(indices).items()}
        values, best = top_k(teacher, batch, config)
        if not is_finite(values):
            raise ValueError("the teacher's logits are not finite on the training rows: nothing can be learnt from it")
        found[indices], tokens[indices] = values.cpu().numpy(), best.cpu().numpy()
    tokens.flush()
    found.flush()


@torch.no_grad()
def top_k(teacher: nn.Module, batch: Batch, config: FinetuneConfig) -> tuple[Tensor, Tensor]:
    """Log-probabilities at the distillation's temperature, and tokens: [B, T, k]."""
    logits_of, _ = teach(teacher, batch)
    assert config.teacher_top_k is not None
    parts = []
    for rows in chunks(batch["input_ids"].numel(), batch["input_ids"].device):
        scores = (logits_of(rows).float() / config.kd_temperature).log_softmax(-1)
        parts.append(scores.topk(config.teacher_top_k))
    values, tokens = (torch.cat(each) for each in zip(*parts, strict=True))
    shape = (*batch["input_ids"].shape, -1)
    return values.view(shape), tokens.view(shape)


def stored_logits(config: FinetuneConfig) -> Loss:
    """`finetune.loss=kd` with `finetune.teacher_top_k`: needs no teacher, but batches that a `StoredTeacher` filled."""

    def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
        keep = batch["labels"] != IGNORE
        tokens, values = batch["teacher_tokens"].flatten(0, 1), batch["teacher_log_probabilities"].flatten(0, 1)
        row_loss = grouped_divergence(tokens, values, keep.flatten(), config.kd_temperature)
        return sum_over_rows(forward(model, batch).logits, row_loss), torch.count_nonzero(keep)

    return loss


def grouped_divergence(tokens: Tensor, log_probabilities: Tensor, keep: Tensor, temperature: float) -> RowLoss:
    """KL(teacher || student) over k tokens and one group of all others, times the temperature's square.

    tokens, log_probabilities: [N, k]. With k = V it is the divergence of whole distributions, below it a lower bound.
    """

    def of_rows(logits: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        named, wanted, kept = tokens[rows], log_probabilities[rows], keep[rows]
        student = (logits / temperature).log_softmax(-1)
        mine, probabilities = student.gather(1, named), wanted.exp()
        tiny = torch.finfo(student.dtype).tiny
        rest = (1 - probabilities.sum(-1)).clamp_min(0)  # [n], the teacher's mass of all others
        my_rest = (1 - mine.exp().sum(-1)).clamp_min(1e-6)
        loss = (probabilities * (wanted - mine)).sum(-1) + rest * (rest.clamp_min(tiny).log() - my_rest.log())
        # dKL/dz of a named token is q - p, of another q (1 - rest / my_rest).
        share = student.exp_()
        own = share.gather(1, named) - probabilities
        gradient = share.mul_((1 - rest / my_rest)[:, None]).scatter_(1, named, own)
        return temperature**2 * (loss * kept).sum(), gradient.mul_((temperature * kept)[:, None])

    return of_rows
