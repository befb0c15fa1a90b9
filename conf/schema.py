"""The configuration's law: every key, its type, its default and what it means.

YAML files under `conf/` are data that fill these dataclasses; a key that is not here is an error.
Read it top to bottom as the reference of all options, and conf/evaluation.py after it. `typed_config(cfg)` turns
what Hydra composed into these objects and runs the cross-field checks, whose messages name the key to change.
"""

from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import Any

from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from conf.checks import home_expanded, require, require_folder_name
from conf.evaluation import BenchConfig, EvalConfig
from conf.naming import point_name
from conf.precision import Dtype


class SourceKind(Enum):
    builtin = "builtin"  # documentation and source of the installed Python environment
    local = "local"  # files on disk
    hub = "hub"  # a dataset on the Hugging Face hub, streamed
    generated = "generated"  # conversations that the original model has with itself (data/converse.py)


class DocumentEnd(Enum):
    auto = "auto"  # none where the tokenizer has a chat template: its eos ends turns, not texts
    eos = "eos"
    none = "none"


class Trainable(Enum):
    all = "all"
    attention = "attention"  # all weights of the attention modules, no norms outside them
    lora = "lora"  # low-rank adapters on the attention's projections, merged at the end


class Precision(Enum):
    auto = "auto"  # bf16 where the device has it
    no = "no"
    bf16 = "bf16"
    fp16 = "fp16"


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Sharding(Enum):
    none = "none"  # every process holds the whole model
    fsdp2 = "fsdp2"  # torch's fully_shard, through Accelerate on GPUs
    zero3 = "zero3"  # DeepSpeed, GPUs alone


class Streamed(Enum):
    auto = "auto"  # where original and converted model would take most of the free memory
    on = "on"
    off = "off"


class ExportForm(Enum):
    native = "native"  # DeepSeek-V3's layout
    vllm = "vllm"  # what vLLM's Transformers backend turns into its own latent attention


class ExportStage(Enum):
    finetune = "finetune"
    convert = "convert"


class TrackingMode(Enum):
    auto = "auto"  # online with a key, else offline
    online = "online"
    offline = "offline"
    none = "none"


DISTILLATION = ("kd", "kd+hidden")  # the losses that have a teacher


@dataclass
class ModelConfig:
    """The pretrained model to convert."""

    path: str = "???"  # hub id, local folder, or package:NAME for weights shipped in a Python package
    name: str | None = None  # folder name under outputs/; default: last part of the path
    revision: str | None = None
    dtype: Dtype = Dtype.auto
    pretrain_tokens: float | None = None  # default: looked up in conf/pretrain_tokens.yaml

    def __post_init__(self) -> None:
        if self.path == "???":
            return
        require(bool(self.path.strip()), "model.path is empty: give a hub id such as org/name, or a checkpoint folder")
        self.path = home_expanded("model.path", self.path)
        if not self.name:
            last = self.path.rstrip("/").split(":")[-1].split("/")[-1]
            self.name = last if last not in ("", ".", "..") else Path(self.path).resolve().name
        require_folder_name("model.name", self.name)


@dataclass
class MLAConfig:
    """What the converted attention looks like; the fields of `mha2mla.ConversionOptions`."""

    # partial: rotated keys are cached; latent: they are made from the latent; full: so are all keys; auto: partial
    # where bits=16, else latent, or full where keys pass a norm
    rope: str = "partial"
    rope_dim: int | None = None  # R: rotated numbers a token a layer; default: an eighth of the keys
    kv_lora_rank: int | None = None  # r: size of the latent; default: what `reduction` leaves after R
    # Wanted cut of the KV cache in bytes; default 0.875, and 0.6875 with bits=16, where it excludes kv_lora_rank.
    reduction: float | None = None
    partial_rope: str = "high"  # a name of mha2mla/partial_rope.py
    rope_basis: str = "heads"  # a name of mha2mla/basis.py
    frequency_folding: int = 1  # neighbouring frequencies that rotate as one; more than 1 needs rope_basis=principal
    expected_rotation: bool = False  # pairs that stop rotating get their mean rotation over near distances
    low_rank: str = "joint"  # a name of mha2mla/low_rank.py
    value_weight: float = 0.35  # λ of low_rank=attention
    rank_allocation: str = "uniform"  # a name of mha2mla/allocation.py
    q_lora_rank: int | None = None
    layers: str = "all"  # or full-attention: those of a sliding window stay as they are
    bits: str = "16"  # of every cached channel: auto (shared out by the loss), 16 (by rank alone), 8, 6, 4, 3, 2 or 1
    context: int = 4096  # tokens of the cache whose bytes `reduction` cuts; read where bits are fewer than 16
    cache_scales: str = "table"  # of codes: calibrated for good, or `token`: a factor of every token's beside them
    residual_length: int = 0  # latest tokens that stay unquantised
    importance: str = "fisher"  # how bits=auto tells what a channel is worth: a name of mha2mla/importance.py
    latent_basis: str = "loss"  # of a latent in few bits, or `factors`: as low_rank leaves it
    # A layer, on the calibration text, after the closed form (mha2mla/reconstruct.py); null: 40 if bits=16, else 0.
    reconstruction_steps: int | None = 0
    # Relative to the root mean square of every weight; where each layer's search for its own rate begins.
    reconstruction_learning_rate: float = 1e-2

    @property
    def reconstructions(self) -> int:
        """Steps of reconstruction a layer."""
        if self.reconstruction_steps is None:
            return 40 if self.bits == "16" else 0
        return self.reconstruction_steps

    def __post_init__(self) -> None:
        require(self.reconstructions >= 0, f"mla.reconstruction_steps={self.reconstruction_steps} must be 0 or more")


@dataclass
class CalibrationConfig:
    """Text that conversion looks at: what its strategies measure, and what layers are reconstructed on."""

    tokens: int = 16384
    sequence_length: int = 1024  # layers fitted on 512 tokens fall apart beyond them (docs/log.md)
    batch_size: int = 2

    def __post_init__(self) -> None:
        for name, least in (("sequence_length", 8), ("tokens", self.sequence_length), ("batch_size", 1)):
            value = getattr(self, name)
            require(value >= least, f"calibration.{name}={value} must be at least {least}")


@dataclass
class SourceConfig:
    """One corpus of the mixture."""

    kind: SourceKind = SourceKind.local
    weight: float = 1.0  # share of the budget, relative to the other sources
    data_files: list[str] = field(default_factory=list)  # local: files, globs or folders
    path: str | None = None  # hub: dataset id, or a folder that holds a copy of one
    name: str | None = None  # hub: dataset configuration; builtin: prose, docstrings or code
    split: str = "train"
    text_column: str = "text"
    messages_column: str | None = None  # conversations instead, [{role, content}, ...], by the chat template

    def check(self, key: str) -> None:
        require(self.weight > 0, f"{key}.weight={self.weight} must be positive")
        if self.kind is SourceKind.local:
            require(bool(self.data_files), f"{key}.data_files is empty: give files, globs or folders")
            require(not self.path and not self.name, f"{key}: path and name mean nothing with kind=local")
        else:
            require(not self.data_files, f"{key}.data_files means nothing with kind={self.kind.value}")
        if self.kind is SourceKind.hub:
            require(bool(self.path), f"{key}.path is missing: give a dataset id such as org/name")
        if self.messages_column:
            require(self.text_column == "text", f"{key}: text_column and messages_column are both given: choose one")
        if self.kind is SourceKind.builtin:
            corpora = ("prose", "docstrings", "code")
            require(self.name in corpora, f"{key}.name={self.name} must be one of {', '.join(corpora)}")
            require(not self.messages_column, f"{key}: messages_column means nothing with kind=builtin")
        if self.kind is SourceKind.generated:
            require(
                self == SourceConfig(self.kind, self.weight), f"{key}: kind=generated knows a weight and nothing else"
            )


@dataclass
class DataConfig:
    """What is sampled for healing."""

    name: str = "data"  # names the folder of shards
    files: list[str] = field(default_factory=list)  # one local corpus: short for `sources` with one source
    text_column: str = "text"  # of `files`
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    fraction: float = 0.003  # of the model's pretraining tokens; used unless `tokens` is given
    tokens: int | None = None
    sequence_length: int = 2048
    validation_tokens: int = 262144  # from documents that training never sees
    document_end: DocumentEnd = DocumentEnd.auto  # the token behind every document; positions tell them apart anyway
    allow_short: bool = False  # take a corpus smaller than the budget as it is
    num_workers: int = 1  # processes that read and tokenise; the result does not depend on it
    shard_tokens: int = 16777216
    seed: int = 0

    def __post_init__(self) -> None:
        require(0 < self.fraction <= 1, f"data.fraction={self.fraction} must lie in (0, 1]")
        require(self.tokens is None or self.tokens > 0, f"data.tokens={self.tokens} must be positive")
        require(self.sequence_length >= 8, f"data.sequence_length={self.sequence_length} must be at least 8")
        require(self.validation_tokens > 0, f"data.validation_tokens={self.validation_tokens} must be positive")
        require(self.num_workers >= 1, f"data.num_workers={self.num_workers} must be at least 1")
        require(self.shard_tokens > 0, f"data.shard_tokens={self.shard_tokens} must be positive")
        if self.files:
            require(not self.sources, "data.files and data.sources are both given: choose one")
            self.sources = {"local": SourceConfig(data_files=self.files, text_column=self.text_column)}
            self.files = []
        for name, source in self.sources.items():
            source.check(f"data.sources.{name}")
        kinds = [source.kind for source in self.sources.values()]
        if SourceKind.generated in kinds:
            require(
                kinds.count(SourceKind.generated) == 1 < len(kinds),
                "data.sources: one source of kind=generated, and others beside it to validate on",
            )


@dataclass
class LoraConfig:
    """Passed to peft.LoraConfig; used with finetune.trainable=lora."""

    r: int = 16
    lora_alpha: int = 32
    lora_dropout: float = 0.0
    init_lora_weights: str = "default"  # default | gaussian | pissa | olora | orthogonal

    def __post_init__(self) -> None:
        require(self.r >= 1, f"finetune.lora.r={self.r} must be at least 1")
        require(0 <= self.lora_dropout < 1, f"finetune.lora.lora_dropout={self.lora_dropout} must lie in [0, 1)")
        inits = ("default", "gaussian", "pissa", "olora", "orthogonal")
        require(
            self.init_lora_weights in inits,
            f"finetune.lora.init_lora_weights={self.init_lora_weights} is unknown; there are: {', '.join(inits)}",
        )


@dataclass
class FinetuneConfig:
    """Healing. Defaults are the paper's recipe (MHA2MLA, appendix); see docs/decisions.md."""

    trainable: Trainable = Trainable.all
    loss: str = "ce"  # a name of train/losses.py: ce, kd or kd+hidden
    teacher: str | None = None  # kd, kd+hidden: hub id or folder; default: the original model
    teacher_top_k: int | None = None  # kd: learn from its k likeliest tokens, stored once beside the data
    kd_temperature: float = 1.0  # kd, kd+hidden: of both distributions; the loss is scaled by its square
    hidden_weight: float = 1.0  # kd+hidden: of the hidden states' relative squared error, against the divergence's
    learning_rate: float = 1e-4
    adam_beta1: float = 0.9
    adam_beta2: float = 0.95
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    warmup_fraction: float = 0.05  # linear warm-up
    decay_fraction: float = 0.15  # 1 - sqrt decay at the end
    max_steps: int | None = None  # default: `epochs` passes over the sampled data
    epochs: int = 1
    global_batch_size: int = 64  # sequences per optimiser step, over all processes
    micro_batch_size: int = 4  # sequences per forward on one process
    mixed_precision: Precision = Precision.auto
    gradient_checkpointing: bool = False
    torch_compile: bool = False
    log_every: int = 10  # steps; also the spacing of lines where there is no terminal
    eval_every: int = 200  # steps between validation perplexities
    eval_tokens: int = 65536  # of the validation split that a perplexity is measured on, from its start
    save_every: int = 200  # steps between checkpoints; a restart repeats at most these
    keep_checkpoints: int = 2  # the newest; all go when the stage has finished
    lora: LoraConfig = field(default_factory=LoraConfig)
    seed: int = 0

    def __post_init__(self) -> None:
        counts = (
            "global_batch_size micro_batch_size epochs log_every eval_every eval_tokens save_every keep_checkpoints"
        )
        for name in counts.split():
            require(getattr(self, name) >= 1, f"finetune.{name}={getattr(self, name)} must be at least 1")
        require(
            self.max_steps is None or self.max_steps >= 1, f"finetune.max_steps={self.max_steps} must be at least 1"
        )
        require(
            self.max_grad_norm > 0, f"finetune.max_grad_norm={self.max_grad_norm} must be positive (.inf: no clipping)"
        )
        for name in ("warmup_fraction", "decay_fraction"):
            require(0 <= getattr(self, name) <= 1, f"finetune.{name}={getattr(self, name)} must lie in [0, 1]")
        require(
            self.global_batch_size % self.micro_batch_size == 0,
            f"finetune.global_batch_size={self.global_batch_size} must be a multiple of "
            f"finetune.micro_batch_size={self.micro_batch_size}",
        )
        require(
            self.warmup_fraction + self.decay_fraction <= 1,
            "finetune.warmup_fraction + finetune.decay_fraction must not exceed 1",
        )
        require(self.learning_rate > 0, f"finetune.learning_rate={self.learning_rate} must be positive")
        for name, losses in (
            ("teacher", DISTILLATION),
            ("teacher_top_k", ("kd",)),
            ("kd_temperature", DISTILLATION),
            ("hidden_weight", ("kd+hidden",)),
        ):
            value = getattr(self, name)
            require(
                self.loss in losses or value == getattr(FinetuneConfig, name),
                f"finetune.{name}={value} has no effect with finetune.loss={self.loss}; use {' or '.join(losses)}",
            )
        require(
            self.teacher_top_k is None or self.teacher_top_k >= 1,
            f"finetune.teacher_top_k={self.teacher_top_k} must be at least 1",
        )
        for name in ("kd_temperature", "hidden_weight"):
            require(getattr(self, name) > 0, f"finetune.{name}={getattr(self, name)} must be positive")


@dataclass
class LaunchConfig:
    """How fine-tuning is started by the pipeline."""

    num_processes: int | None = None  # default: all GPUs seen, or 1
    device: Device = Device.auto
    accelerate_config: str | None = None  # a file written by `accelerate config`
    sharding: Sharding = Sharding.none  # of weights, gradients and moments over the processes
    num_machines: int = 1
    machine_rank: int = 0  # of this machine; the same command on each
    main_process_ip: str | None = None  # of machine 0
    main_process_port: int = 29500
    streamed: Streamed = Streamed.auto  # convert layer by layer, straight from the checkpoint's files

    def __post_init__(self) -> None:
        require(
            self.num_processes is None or self.num_processes >= 1,
            f"launch.num_processes={self.num_processes} must be at least 1",
        )
        require(
            0 <= self.machine_rank < self.num_machines,
            f"launch.machine_rank={self.machine_rank} must lie in 0..{self.num_machines - 1} (launch.num_machines)",
        )
        if self.num_machines > 1:
            require(bool(self.main_process_ip), "launch.num_machines > 1 needs launch.main_process_ip, of machine 0")
            require(bool(self.num_processes), "launch.num_machines > 1 needs launch.num_processes, of all machines")
            require(
                (self.num_processes or 0) % self.num_machines == 0,
                f"launch.num_processes={self.num_processes} is of all machines: a multiple of launch.num_machines="
                f"{self.num_machines}",
            )


@dataclass
class ExportConfig:
    """`python -m train.export`: a finished model for other programs."""

    form: ExportForm = ExportForm.native
    stage: ExportStage = ExportStage.finetune  # whose model
    dtype: Dtype = Dtype.auto  # auto: that of the checkpoint


@dataclass
class TrackingConfig:
    mode: TrackingMode = TrackingMode.auto
    project: str = "mha2mla"
    entity: str | None = None

    def __post_init__(self) -> None:
        refused = [letter for letter in "/\\#?%:" if letter in self.project]  # W&B's own rule, offline too
        require(not refused, f"tracking.project={self.project} must not contain any of / \\ # ? % :")


@dataclass
class StudyPoint(MLAConfig):
    """One conversion of a training-free study."""

    reference: float | None = None  # a perplexity to compare with


@dataclass
class StudyConfig:
    """Perplexity of conversions without any healing (`python -m eval.training_free`)."""

    name: str = "training_free"  # of the file of results
    text: str | None = None  # plain text file
    tokens: int = 10240  # from its start, without special tokens
    sequence_length: int = 512
    reductions: list[float] = field(default_factory=list)  # every point at each of these; empty: as the points say
    points: dict[str, StudyPoint] = field(default_factory=dict)


@dataclass
class Config:
    model: ModelConfig = field(default_factory=ModelConfig)
    mla: MLAConfig = field(default_factory=MLAConfig)
    calibration: CalibrationConfig = field(default_factory=CalibrationConfig)
    data: DataConfig = field(default_factory=DataConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    bench: BenchConfig = field(default_factory=BenchConfig)
    study: StudyConfig = field(default_factory=StudyConfig)
    launch: LaunchConfig = field(default_factory=LaunchConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    name: str | None = None  # folder of this point; default: see conf/naming.py
    output_dir: str = "outputs"
    force: bool = False  # run a stage again although it is finished

    def __post_init__(self) -> None:
        self.output_dir = home_expanded("output_dir", self.output_dir)
        require_folder_name("data.name", self.data.name)
        require_folder_name("study.name", self.study.name)
        if not self.name:
            self.name = point_name(self.mla)
        require_folder_name("name", self.name)
        taken = self.name == "original" or self.name.startswith(("data-", "conversations-"))
        require(not taken, f"name={self.name} is the name of a folder that all points of a model share; give another")
        tokens, length = self.calibration.tokens, self.calibration.sequence_length
        require(
            not self.mla.reconstructions or tokens > length,
            f"calibration.tokens={tokens} is one sequence (calibration.sequence_length={length}): reconstruction fits "
            "layers on some sequences and judges them on others; give more tokens, or mla.reconstruction_steps=0",
        )


def typed_config(cfg: DictConfig) -> Config:
    """The composed configuration as checked dataclasses; the first line of every stage's `main`."""
    config: Any = OmegaConf.to_object(cfg)
    assert isinstance(config, Config), type(config)
    return config


ConfigStore.instance().store(name="base_config", node=Config)
