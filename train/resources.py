"""Memory and time that conversion and healing need, from a model's configuration alone.

    python -m train.resources > docs/results/scaling.json
    python -m train.resources --measured > docs/results/scaling_measured.json

One formula for `train.inspect` and docs/scaling.md; what it is checked against stands there. Rough by design: within a
factor of two. d hidden size, L layers, P parameters, N processes.
"""

import json
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from conf.stage import provenance
from mha2mla.channels import GRADIENTS, TOKENS
from mha2mla.families import attention_layers, geometry_of
from mha2mla.output_head import ROWS

GIB = 2**30
BF16, FP32 = 2, 4
UTILISATION = 0.10  # share of a GPU's peak that healing reached with sdpa and packed documents (train_speed_gpu.json)
PROGRAM = 1.0  # GiB that Python, torch and transformers take themselves
STEP = 0.01  # seconds that a step of reconstruction takes however small the layer
EIGENVALUES, PRODUCTS = 25, 6  # times n³ and n d² multiplications a layer in float64, n rows of keys and values
MOVED = 100  # times that a step of reconstruction reads or writes all queries, keys and values


@dataclass(frozen=True)
class Machine:
    """What computes, with nothing else to do: rates in multiplications and additions a second, of products in bfloat16
    as in training, in float32 and in float64, and bytes moved a second."""

    name: str
    kind: str  # torch's name of such a device
    rate: float
    float32: float
    float64: float
    bandwidth: float


H100 = Machine("H100", "cuda", 989e12 * UTILISATION, 67e12 * UTILISATION, 20e12, 2e12)
# These fit default_run.json and streamed.json in docs/results.
TWO_CORES = Machine("2 CPU cores", "cpu", 0.19e12, 0.06e12, 0.06e12, 10e9)
NO_BFLOAT16 = replace(TWO_CORES, name="2 CPU cores without bfloat16", rate=TWO_CORES.float32, float64=0.03e12)


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

    @property
    def active_layers(self) -> int:
        """Parameters of all layers that a token passes, without embedding and output layer."""
        return self.active - (self.total - self.layers * self.layer)


def sizes_of(config: Any) -> Sizes:
    with torch.device("meta"):
        return count(AutoModelForCausalLM.from_config(config))


def count(model: Any) -> Sizes:
    """Sizes of a model, whose weights may be on "meta"."""
    config = model.config
    decoder = model.base_model
    layer = decoder.layers[0]
    total, one = (sum(p.numel() for p in module.parameters()) for module in (model, layer))
    attention = attention_layers(model)[0]
    embedding = model.get_input_embeddings().weight.numel()
    experts = sum(p.numel() for name, p in layer.named_parameters() if ".experts." in name)
    chosen = getattr(config, "num_experts_per_tok", None)
    number = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None) or 1
    idle = experts * (1 - chosen / number) if experts and chosen else 0
    layers = config.num_hidden_layers
    return Sizes(
        total=total,
        embedding=embedding,
        layer=one,
        attention=sum(p.numel() for p in attention.parameters()),
        active=int(total - idle * layers),
        stored=(getattr(config, "dtype", None) or torch.bfloat16).itemsize,
        layers=layers,
        hidden=config.hidden_size,
        vocabulary=config.vocab_size,
    )


def conversion(
    config: Any, sizes: Sizes, tokens: int, steps: int, length: int, machine: Machine, coded: bool = False
) -> dict[str, float]:
    """Peak memory in GiB with the whole model in memory and layer by layer, and seconds.

    tokens: calibration; both models are compared on an eighth as many, at least a sequence. steps: of reconstruction, a
    layer, one sequence of `length` tokens each. coded: whether a cache format is chosen, on text of its own.
    """
    d, head = sizes.hidden, sizes.vocabulary * sizes.hidden
    geometry = geometry_of(config)
    moments = FP32 * d * d
    states = tokens * d * BF16
    # A layer is fitted in float32 with gradients and Adam's moments; its inputs and targets stand beside the states.
    fitting = 5 * FP32 * sizes.attention + (4 * states if steps else 0)
    # Of some rows at a time: logits of both models, their logarithms of probabilities, and the divergence's terms.
    compared = min(length, ROWS[machine.kind]) * sizes.vocabulary * (2 * sizes.stored + 3 * FP32)
    tied = sizes.stored * sizes.embedding  # which stands twice while the converted model is put together
    whole = 2 * sizes.stored * sizes.total + sizes.layers * moments + max(fitting, compared, tied)
    streamed = 2 * sizes.stored * sizes.layer + 4 * moments + tied + max(fitting, compared)
    passes = 2 * sizes.active_layers * tokens * (3 if steps else 1)  # statistics; both models' states
    trained = 6 * sizes.attention * steps * length * sizes.layers
    heldout = max(tokens // 8, length)
    comparisons = 2 * 2 * (sizes.active_layers + head) * heldout * (2 if steps else 1)  # not under autocast
    if coded:
        comparisons += 2 * (sizes.active_layers + head) * (TOKENS + 2 * GRADIENTS)
    moved = MOVED * FP32 * 3 * geometry.num_heads * geometry.head_dim * steps * length * sizes.layers
    rows = 2 * geometry.key_size
    factored = sizes.layers * (EIGENVALUES * rows**3 + PRODUCTS * rows * d**2)
    seconds = {
        "products": (passes + trained) / machine.rate,
        "comparisons": comparisons / (machine.rate if sizes.stored == BF16 else machine.float32),
        "moved": moved / machine.bandwidth + STEP * steps * sizes.layers,
        "factored": factored / machine.float64,
    }
    return {
        "whole_gib": PROGRAM + whole / GIB,
        "streamed_gib": PROGRAM + streamed / GIB,
        "seconds": sum(seconds.values()),
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


SHAPES = {  # published models' sizes: hidden, intermediate, layers, heads, key/value heads, head size, vocabulary, tied
    "135M": (576, 1536, 30, 9, 3, 64, 49152, True),
    "1.7B": (2048, 8192, 24, 32, 32, 64, 49152, True),
    "7B": (4096, 11008, 32, 32, 32, 128, 32000, False),
    "70B": (8192, 28672, 80, 64, 8, 128, 128256, False),
}
HEALED = {"135M": 2.25e9, "1.7B": 6e9, "7B": 6e9, "70B": 6e9}  # tokens of the paper's recipe; 70B: as 7B


def shape(name: str) -> Any:
    hidden, intermediate, layers, heads, groups, size, vocabulary, tied = SHAPES[name]
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=size,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        dtype="bfloat16",
    )


def scaling() -> list[dict[str, Any]]:
    """Every size on 1, 8 and 64 GPUs: what docs/scaling.md shows."""
    rows = []
    for name in SHAPES:
        config = shape(name)
        sizes = sizes_of(config)
        for gpus in (1, 8, 64):
            need = healing(sizes, HEALED[name], 1, 2048, H100, gpus, sharded=gpus > 1, checkpointing=True)
            whole = conversion(config, sizes, 16384, 40, 1024, H100)
            rows.append({"model": name, "gpus": gpus, "conversion": whole, "healing": need, "tokens": HEALED[name]})
    return rows


def measured(results: Path) -> list[dict[str, Any]]:
    """What docs/results/ has measured, beside what the formula says of the same."""
    rows: list[dict[str, Any]] = []

    def add(what: str, found: float, formula: float, unit: str) -> None:
        shown = (f"{value:,.0f} {unit}" if value >= 100 else f"{value:.1f} {unit}" for value in (found, formula))
        rows.append(dict(zip(("measured", "formula"), shown, strict=True)) | {"what": what, "ratio": formula / found})

    def load(name: str) -> Any:
        return json.loads((results / f"{name}.json").read_text())

    small = shape("135M")
    small.dtype = torch.float32  # as the default model is unpacked
    sizes, stages = sizes_of(small), load("default_run")["stages"]
    convert = conversion(small, sizes, 16384, 0, 1024, TWO_CORES, coded=True)
    heal = healing(sizes, 65536, 2, 512, TWO_CORES, trainable="attention")
    add("default run, convert, 2 CPU cores", stages["convert"]["seconds"], convert["seconds"], "s")
    add("default run, finetune, 2 CPU cores", stages["finetune"]["seconds"], heal["seconds"], "s")
    for row in load("train_speed_gpu")["rows"]:
        if row["attn_implementation"] == "sdpa" and not row["torch_compile"]:
            kind = "packed" if row["packed_documents"] else "plain"
            what = f"135M, H200, {row['sequences']} x 2,048 {kind}, {row['trainable']}"
            need = healing(sizes, 1e6, row["sequences"], 2048, H100, trainable=row["trainable"])
            add(f"{what}: memory", row["peak_memory_gib"], need["gib"], "GiB")
            add(f"{what}: 1 M tokens", 1e6 / row["tokens_per_second"], need["seconds"], "s")
    if (results / "streamed.json").exists():
        run = load("streamed")
        large = LlamaConfig(**run["shape"], dtype="bfloat16")
        need = conversion(large, sizes_of(large), run["calibration_tokens"], 0, run["length"], TWO_CORES)
        what = f"{run['bytes'] / 1e9:.1f} GB layer by layer, 2 CPU cores"
        add(f"{what}: memory", run["peak_gib"], need["streamed_gib"], "GiB")
        add(f"{what}: time", run["seconds"], need["seconds"], "s")
    return rows


if __name__ == "__main__":
    if "--measured" in sys.argv:
        found: dict[str, Any] = {"rows": measured(Path(__file__).parents[1] / "docs" / "results")}
    else:
        found = {"machine": H100.name, "rows": scaling()}
    print(json.dumps(found | {"provenance": provenance()}, indent=1))
