"""The model that fine-tuning trains: loaded in float32, with all, the attention's or LoRA's weights trainable;
and saved again as what it was, an ordinary checkpoint of the converted model's class and dtype."""

from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from conf.checkpoint import load_model
from conf.pretrained import load_tokenizer
from conf.schema import FinetuneConfig, LoraConfig, Trainable
from train.checkpoint import appearing_in
from train.sharding import whole_state

ATTENTION = (".self_attn.", ".attention.")  # in the names of attention weights; the second is GPT-NeoX's


def trainable_model(folder: Path, config: FinetuneConfig) -> nn.Module:
    """The model in float32 master weights, with `requires_grad` on what `finetune.trainable` names."""
    model = load_model(folder, torch.float32)
    if config.trainable is Trainable.all:
        return model
    if not any(is_attention(name) for name, _ in model.named_parameters()):
        raise ValueError(
            f"finetune.trainable={config.trainable.value}: {type(model).__name__} has no weights named {ATTENTION}"
        )
    if config.trainable is Trainable.lora:
        return with_lora(model, config.lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_attention(name))
    return model


def is_attention(name: str) -> bool:
    return any(part in name for part in ATTENTION)


def with_lora(model: PreTrainedModel, lora: LoraConfig) -> PeftModel:
    """Low-rank adapters on every linear layer of the attention, whatever its projections are called."""
    layers = [name for name, module in model.named_modules() if is_attention(name) and isinstance(module, nn.Linear)]
    init: Any = True if lora.init_lora_weights == "default" else lora.init_lora_weights
    options = PeftConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.lora_dropout,
        init_lora_weights=init,
        target_modules=layers,
    )
    peft_model = get_peft_model(model, options)
    assert isinstance(peft_model, PeftModel)
    return peft_model


def save_model(accelerator: Accelerator, model: nn.Module, source: Path, output: Path, config: FinetuneConfig) -> None:
    """Write the trained weights into `output` in the class and dtypes of the checkpoint in `source`.

    Called by every process. The weights go into fresh models rather than out of the trained one, which may be
    wrapped, compiled, sharded or adapted.
    """
    state = whole_state(accelerator, model)
    state = {name.removeprefix("_orig_mod."): tensor for name, tensor in state.items()}  # torch.compile's wrapper
    if accelerator.is_main_process:
        if config.trainable is Trainable.lora:
            adapted: Any = trainable_model(source, config)
            adapted.load_state_dict(state)
            state = adapted.merge_and_unload().state_dict()
        healed = load_model(source, "auto")
        healed.load_state_dict(state)
        with appearing_in(output) as folder:
            healed.save_pretrained(folder)
            load_tokenizer(source).save_pretrained(folder)
    accelerator.wait_for_everyone()
