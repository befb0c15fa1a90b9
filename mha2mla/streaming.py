"""Conversion of a checkpoint layer by layer, for models larger than memory.

Only the layer at hand is in memory, with the states of the text before it: those of the original, which the layer's
statistics and targets come from, and those of the converted layers, which it is fitted on. A finished layer is a file
of the new checkpoint; beside it lie the states that the next begins with. So a killed conversion goes on at the layer
it was at, and its result is the same to the last bit.
"""

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.dynamic_module_utils import custom_object_save

from mha2mla.compare import Comparison, Tally
from mha2mla.convert import ConversionReport, conversion_report, needs_calibration, resolve_options
from mha2mla.families import attention_layers, family_of, geometry_of
from mha2mla.finite import check_weights
from mha2mla.layer import LayerReport, convert_layer
from mha2mla.layerwise import embed, pass_layer
from mha2mla.memory import hand_back
from mha2mla.options import ConversionOptions
from mha2mla.output_head import Given, logits_from
from mha2mla.reconstruct import RATE, LayerFit, check_sequences, fit_to, pass_targets
from mha2mla.rotation import Rotation
from mha2mla.self_check import check_layer, first_of_every_kind, require_exact
from mha2mla.shards import Shards, without_weights, write_index, write_shard
from mha2mla.statistics import LayerStatistics
from mha2mla.target import chosen_layers, converted_config, rotations_of
from mha2mla.token_ids import without_negative_pad

STATE = "unfinished"  # folder of what a restart needs
PROGRESS = "progress.json"


@dataclass
class Text:
    """States [1, S, d] of every sequence before the next layer, in the original and in the converted model."""

    theirs: list[torch.Tensor]
    ours: list[torch.Tensor]


@dataclass
class Progress:
    """What is done of a conversion: layers, their reports, and what it was asked for."""

    key: str
    layers: int = 0
    error: float = 0.0
    reports: list[dict[str, Any]] = field(default_factory=list)
    fits: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Streamed:
    report: ConversionReport
    fits: list[LayerFit]
    comparison: Comparison | None


def convert_streamed(
    source: Path | str,
    output: Path,
    options: ConversionOptions,
    calibration: list[torch.Tensor],
    heldout: list[torch.Tensor],
    steps: int = 0,
    learning_rate: float = RATE,
    device: str = "cpu",
    on_layer: Callable[[int, LayerFit], None] | None = None,
    forget: bool = True,
) -> Streamed:
    """Convert a checkpoint folder of safetensors into `output`, with statistics and reconstruction.

    calibration, heldout: input_ids [B, S] without padding; the perplexities of both models are measured on the latter.
    steps, learning_rate: of reconstruction (mha2mla/reconstruct.py).
    on_layer: is told of every layer, also of those that an earlier run finished.
    forget: remove what a restart needs when all is done; else `forget_progress` does.
    The result is what `convert` and `reconstruct` give on the whole model, to rounding.
    Raises ValueError for missing or broken files, for weights and activations that are not finite, and for
    rank_allocation other than uniform.
    """
    job = start(Path(source), output, options, steps, learning_rate, device)
    if needs_calibration(job.options) and not calibration:
        raise ValueError(f"{', '.join(needs_calibration(job.options))}: looks at calibration text; give some")
    if calibration:
        check_sequences(sum(len(batch) for batch in calibration), steps)
    progress = read_progress(output, key_of(job, [calibration, heldout]))
    layers = job.config.num_hidden_layers
    if progress.layers:
        texts = read_states(output, progress.layers)
    else:
        for leftover in output.glob("model*.safetensors*"):
            leftover.unlink()
        check_weights((name, job.shards.read(name)) for name in job.shards.stored)  # once, not for every restart
        write_rest(job)
        texts = first_states(job, [calibration, heldout])
    for index in range(layers):
        if index >= progress.layers:
            fit = convert_one(job, index, texts, progress)
            progress.layers += 1
            progress.fits.append(asdict(fit))
            write_states(output, progress, texts)
        if on_layer:
            on_layer(index, LayerFit(**progress.fits[index]))
    comparison = compare_states(job, texts[1], heldout) if heldout else None
    finish(job)
    if forget:
        forget_progress(output)
    ranks = [job.options.kv_lora_rank or 0] * layers
    reports = [LayerReport(**each) for each in progress.reports]
    report = conversion_report(job.config, job.options, ranks, progress.error, reports)
    return Streamed(report, [LayerFit(**each) for each in progress.fits], comparison)


@dataclass
class Job:
    """One conversion: two skeletons whose layers are filled one at a time, and what fills them."""

    source: Path
    output: Path
    config: Any
    own_config: Any
    options: ConversionOptions
    shards: Shards
    teacher: Any
    student: Any
    steps: int
    learning_rate: float
    device: str
    rotations: list[Rotation]

    @property
    def prefix(self) -> str:
        return f"{self.teacher.base_model_prefix}."


def start(source: Path, output: Path, options: ConversionOptions, steps: int, learning_rate: float, device: str) -> Job:
    """Check everything that configuration and files can tell, and build both skeletons."""
    config = AutoConfig.from_pretrained(source)
    family, options = family_of(config), resolve_options(config, options)
    if options.rank_allocation != "uniform":
        raise ValueError(
            f"rank_allocation={options.rank_allocation} compares all layers before the first is converted; layer by "
            "layer only uniform is possible"
        )
    with without_weights():
        teacher = AutoModelForCausalLM.from_config(config).eval()
    shards = Shards(source, teacher)
    config.tie_word_embeddings = shards.tied
    with without_weights():
        first = chosen_layers(config, options)[0]
        own_config = converted_config(config, options, attention_layers(teacher)[first])
        student = family.causal_lm_class(own_config).eval()
    student.base_model.rotary_emb = teacher.base_model.rotary_emb.to(device)
    (output / STATE).mkdir(parents=True, exist_ok=True)
    return Job(
        source=source,
        output=output,
        config=config,
        own_config=own_config,
        options=options,
        shards=shards,
        teacher=teacher,
        student=student,
        steps=steps,
        learning_rate=learning_rate,
        device=device,
        rotations=rotations_of(teacher),
    )


def key_of(job: Job, texts: list[list[torch.Tensor]]) -> str:
    """What makes a conversion this one: the checkpoint, what is asked for, and the text."""
    sha = hashlib.sha256(repr([asdict(job.options), job.steps, job.learning_rate, str(job.shards.dtype)]).encode())
    sha.update(f"{job.source.resolve()}{job.config.to_json_string()}".encode())
    for name in sorted(job.shards.files):
        stat = (job.source / name).stat()
        sha.update(f"{name}{stat.st_size}{stat.st_mtime_ns}".encode())
    for batch in (batch for batches in texts for batch in [torch.tensor([len(batches)]), *batches]):
        sha.update(batch.cpu().numpy().tobytes())
    return sha.hexdigest()


def convert_one(job: Job, index: int, texts: list[Text], progress: Progress) -> LayerFit:
    """Convert and fit one layer, take all states through it, and write its file."""
    config, teacher, student = job.config, job.teacher, job.student
    name, geometry = f"{job.prefix}layers.{index}.", geometry_of(config)
    layer, copy = teacher.base_model.layers[index], student.base_model.layers[index]
    job.shards.fill(layer, name, job.device)
    inputs, targets = pass_targets(teacher.base_model, index, texts[0].theirs)
    state, latent = layer.state_dict(), index in chosen_layers(config, job.options)
    if latent:
        original, own = attention_layers(teacher)[index], f"{family_of(config).attention_name}."
        statistics, rotation = statistics_of(original, inputs, geometry, index), job.rotations[index]
        with torch.autocast(torch.device(job.device).type, enabled=False):
            if index in first_of_every_kind(teacher):
                error = check_layer(teacher, index, job.options.rope)
                progress.error = max(progress.error, require_exact(error, config.model_type))
            weights, report = convert_layer(original, geometry, job.options, rotation, statistics)
        hand_back(job.device)
        progress.reports.append(asdict(report))
        state = {key: tensor for key, tensor in state.items() if not key.startswith(own)}
        # Cloned: what conversion leaves as it was is still the original layer's own.
        state |= {own + key: tensor.clone() for key, tensor in weights.items()}
    del inputs
    copy.load_state_dict(state, assign=True)
    fit = LayerFit(0.0, 0.0)
    if texts[0].ours:
        steps = job.steps if latent else 0
        fit = fit_to(student.base_model, index, texts[0].ours, targets, steps, job.learning_rate)
    with torch.no_grad():
        for model, states in ((teacher, texts[1].theirs), (student, texts[1].ours)):
            states[:] = [pass_layer(model.base_model, index, before).states for before in states]
    tensors = {name + key: tensor for key, tensor in copy.state_dict().items()}
    write_shard(shard_file(job.output, index + 1, config.num_hidden_layers), tensors)
    layer.to("meta")
    copy.to("meta")
    del state, tensors, targets
    hand_back(job.device)
    return fit


def statistics_of(attention: Any, inputs: list[torch.Tensor], geometry: Any, index: int) -> LayerStatistics | None:
    """The same as `collect_statistics` has of this layer; None without text."""
    if not inputs:
        return None
    statistics = LayerStatistics.zeros(geometry, inputs[0].device)
    with torch.no_grad():
        for states in inputs:
            statistics.observe(attention, states.flatten(0, 1), geometry)
    statistics.divide(sum(states.shape[0] * states.shape[1] for states in inputs))
    statistics.check(index)
    return statistics


@torch.no_grad()
def first_states(job: Job, batches: list[list[torch.Tensor]]) -> list[Text]:
    """States of every sequence before the first layer; the embedding is in memory only meanwhile."""
    embedding = job.teacher.get_input_embeddings()
    job.shards.fill(embedding, f"{name_of(embedding, job.teacher)}.", job.device)
    texts = []
    for some in batches:
        states = [embed(job.teacher.base_model, row.to(job.device)) for batch in some for row in batch.split(1)]
        texts.append(Text(states, [row.clone() for row in states]))
    embedding.to("meta")
    return texts


def name_of(module: nn.Module, model: nn.Module) -> str:
    return next(name for name, each in model.named_modules() if each is module)


@torch.no_grad()
def compare_states(job: Job, text: Text, batches: list[torch.Tensor]) -> Comparison:
    """`compare` of both models, from the states behind their last layers: the end of the model is the same in both."""
    teacher, decoder = job.teacher, job.teacher.base_model
    head = teacher.get_output_embeddings()
    job.shards.fill(head, f"{name_of(head, teacher)}.", job.device)
    for name, module in decoder.named_children():
        if "norm" in name:
            job.shards.fill(module, f"{job.prefix}{name}.", job.device)
    tally, layers = Tally(), decoder.layers
    rows = [row for batch in batches for row in batch.split(1)]
    for row, theirs, ours in zip(rows, text.theirs, text.ours, strict=True):
        logits = []
        for states in (theirs, ours):
            decoder.layers = nn.ModuleList([Given(states)])
            output = decoder(inputs_embeds=torch.zeros_like(states), use_cache=False)
            logits.append(logits_from(teacher, output))
        tally.add(logits[0], logits[1], row[0, 1:].to(job.device))
    decoder.layers = layers
    return tally.comparison()


def shard_file(output: Path, number: int, layers: int) -> Path:
    return output / f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"


def write_rest(job: Job) -> None:
    """The first file: everything that is in no layer."""
    layers, shared = f"{job.prefix}layers.", job.shards.shared
    names = [name for name in job.teacher.state_dict() if not name.startswith(layers) and name not in shared]
    rest = {name: job.shards.read(name) for name in names}
    write_shard(shard_file(job.output, 0, job.config.num_hidden_layers), rest)


def read_progress(output: Path, key: str) -> Progress:
    """What an earlier run of the same conversion has done; of another one nothing is kept."""
    file = output / STATE / PROGRESS
    if file.exists():
        progress = Progress(**json.loads(file.read_text()))
        if progress.key == key and states_file(output, progress.layers).exists():
            return progress
    return Progress(key)


def states_file(output: Path, layers: int) -> Path:
    return output / STATE / f"states-{layers:05d}.safetensors"


def write_states(output: Path, progress: Progress, texts: list[Text]) -> None:
    """The states first, then the note that they hold, then the earlier ones go: a kill in between loses one layer."""
    named = {
        f"{number}.{side}.{row:06d}": states
        for number, text in enumerate(texts)
        for side in ("theirs", "ours")
        for row, states in enumerate(getattr(text, side))
    }
    write_shard(states_file(output, progress.layers), named)
    file = output / STATE / PROGRESS
    temporary = file.with_suffix(".tmp")
    temporary.write_text(json.dumps(asdict(progress)))
    temporary.replace(file)
    states_file(output, progress.layers - 1).unlink(missing_ok=True)


def read_states(output: Path, layers: int) -> list[Text]:
    found = load_file(states_file(output, layers))
    texts = [Text([], []), Text([], [])]
    for name in sorted(found):
        number, side, _ = name.split(".")
        getattr(texts[int(number)], side).append(found[name])
    return texts


def finish(job: Job) -> None:
    """What makes the files a checkpoint, its configuration last."""
    layers = job.config.num_hidden_layers
    write_index(job.output, [shard_file(job.output, number, layers) for number in range(layers + 1)])
    job.own_config.architectures, job.own_config.dtype = [type(job.student).__name__], job.shards.dtype
    custom_object_save(job.student, job.output, config=job.own_config)
    if (job.source / "generation_config.json").exists():
        without_negative_pad(GenerationConfig.from_pretrained(job.source)).save_pretrained(job.output)
    job.own_config.save_pretrained(job.output)


def forget_progress(output: Path) -> None:
    """Remove what only a restart needs; the note of it first, so that a kill in between leaves none to believe."""
    (output / STATE / PROGRESS).unlink(missing_ok=True)
    shutil.rmtree(output / STATE, ignore_errors=True)
