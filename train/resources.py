"""Memory and time that conversion and healing need, from a model's configuration alone.

One formula for `train.inspect` and docs/scaling.md; what it is checked against stands there. Rough by design: within a
factor of two. d hidden size, L layers, P parameters, N processes.
"""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from mha2mla.families import geometry_of

GIB = 2**30
BF16, FP32 = 2, 4
UTILISATION = 0.10  # share of a GPU's peak that healing reached with sdpa and packed documents (train_speed_gpu.json)
PROGRAM = 1.0  # GiB that Python, torch and transformers take themselves
FACTORING = 60  # d³ multiplications of eigenvalues, least squares and roots of one layer, in float64


@dataclass(frozen=True)
class Machine:
    """What computes: rates in multiplications and additions a second, of products as in training and in float64."""

    name: str
    rate: float
    float64: float


H100 = Machine("H100", 989e12 * UTILISATION, 20e12)
TWO_CORES = Machine("2 CPU cores", 0.19e12, 0.02e12)  # fits the default run (docs/results/default_run.json)


@dataclass(frozen=True)
class Sizes:
    """Parameters of a model, counted on a model without weights."""

    total: int
    embedding: int
    layer: int
    attention: int  # of one layer
    active: int  # that a token passes: all but the experts it is not sent to
    stored: int  # bytes of a parameter as the checkpoint has it
    layers: int
    hidden: int
    vocabulary: int


def sizes_of(config: Any) -> Sizes:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    decoder = model.base_model
    layer = decoder.layers[0]
    count = {name: sum(p.numel() for p in module.parameters()) for name, module in (("all", model), ("one", layer))}
    attention = getattr(layer, "self_attn", None) or layer.attention
    embedding = model.get_input_embeddings().weight.numel()
    experts = sum(p.numel() for name, p in layer.named_parameters() if ".experts." in name)
    chosen = getattr(config, "num_experts_per_tok", None)
    number = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    idle = experts * (1 - chosen / number) if experts and chosen else 0
    layers = config.num_hidden_layers
    return Sizes(
        total=count["all"],
        embedding=embedding,
        layer=count["one"],
        attention=sum(p.numel() for p in attention.parameters()),
        active=int(count["all"] - idle * layers),
        stored=(getattr(config, "dtype", None) or torch.bfloat16).itemsize,
        layers=layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
    )


def conversion(config: Any, sizes: Sizes, tokens: int, steps: int, length: int, machine: Machine) -> dict[str, float]:
    """Peak memory in GiB with the whole model in memory and layer by layer, and seconds.

    tokens: calibration; steps: of reconstruction, a layer, one sequence of `length` tokens each.
    """
    d = sizes.hidden
    moments = FP32 * d * d
    states = tokens * d * BF16
    # A layer is fitted in float32 with gradients and Adam's moments; its inputs and targets stand beside the states.
    fitting = 5 * FP32 * sizes.attention + (4 * states if steps else 0)
    measured = 2 * length * sizes.vocabulary * (BF16 + FP32)  # logits of both models, for their perplexities
    whole = 2 * sizes.stored * sizes.total + sizes.layers * moments + max(fitting, measured)
    streamed = 2 * sizes.stored * sizes.layer + sizes.stored * sizes.embedding + 4 * moments + fitting
    passes = 2 * sizes.active * tokens * (3 if steps else 1)  # statistics; both models' states
    trained = 6 * sizes.attention * steps * length * sizes.layers
    factored = sizes.layers * FACTORING * (d**3 + (2 * geometry_of(config).key_size) ** 3)
    return {
        "whole_gib": PROGRAM + whole / GIB,
        "streamed_gib": PROGRAM + streamed / GIB,
        "seconds": (passes + trained) / machine.rate + factored / machine.float64,
    }


def healing(
    sizes: Sizes,
    tokens: float,
    micro_batch: int,
    length: int,
    machine: Machine,
    processes: int = 1,
    sharded: bool = False,
    trainable: str = "all",
    checkpointing: bool = False,
) -> dict[str, float]:
    """Peak memory of one process in GiB, and seconds, of training on so many tokens.

    Weights in float32 with gradients and Adam's moments of what trains, shared by all processes if `sharded`; the
    activations of a micro-batch in bfloat16 and its logits.
    """
    trained = sizes.total if trainable == "all" else sizes.layers * sizes.attention
    held = FP32 * (sizes.total + 3 * trained) / (processes if sharded else 1)
    rows = micro_batch * length
    # Numbers a token that a layer keeps for the way back: some of its own width, some as its weights are wide.
    kept = 2 * sizes.hidden if checkpointing else 9 * sizes.hidden + 1.8 * sizes.layer / sizes.hidden
    activations = rows * (sizes.layers * kept + sizes.vocabulary) * BF16
    share = 6 * sizes.active if trainable == "all" else 4 * sizes.active + 2 * trained
    again = 2 * sizes.active if checkpointing else 0
    return {
        "gib": PROGRAM + (held + activations) / GIB,
        "seconds": tokens * (share + again) / (machine.rate * processes),
    }
