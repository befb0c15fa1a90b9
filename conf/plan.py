"""The stages of one configuration: their folders, and how each one's key follows from the ones before.

outputs/<model>/original/            scores of the unconverted model, shared by every point
outputs/<model>/baselines/<name>/    scores of the unconverted model with a quantised cache, shared by every point
outputs/<model>/conversations-<name>/  what the original says, where a source is generated
outputs/<model>/data-<name>/         sampled shards, shared by every point
outputs/<model>/<point>/convert/     converted checkpoint
outputs/<model>/<point>/finetune/    healed checkpoint
outputs/<model>/<point>/evaluate/    scores of converted and healed
outputs/<model>/<point>/export-<form>/  what other programs load (train/export.py)
outputs/<model>/<point>/report/      report.html, report.md, results.json, pictures
"""

from dataclasses import asdict
from enum import Enum
from pathlib import Path
from typing import Any

from conf.evaluation import EvalConfig, baseline_bits
from conf.models import data_folder, model_fingerprint, teacher_config
from conf.schema import DISTILLATION, Config, DataConfig, ExportStage, SourceKind
from conf.stage import Stage, fingerprint, write_json

# What conversations depend on of `data`.
CONVERSED = ("sources", "tokens", "fraction", "sequence_length", "seed")


def plain(value: Any) -> Any:
    """Dataclasses and enums as what YAML and JSON hold."""
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return plain(asdict(value)) if hasattr(value, "__dataclass_fields__") else value


class Plan:
    """All stages of one point. `model_dir` is shared by every point of a model, `run_dir` is the point's own."""

    def __init__(self, config: Config):
        self.config = config
        self.model_dir = Path(config.output_dir) / str(config.model.name)
        self.run_dir = self.model_dir / str(config.name)
        self.check_apart()
        model = {"model": model_fingerprint(config)}
        shown = {"model": plain(config.model)}

        self.converses = any(source.kind is SourceKind.generated for source in config.data.sources.values())
        self.converse = Stage(
            "converse",
            self.model_dir / f"conversations-{config.data.name}",
            shown | {"data": {name: plain(getattr(config.data, name)) for name in CONVERSED}},
            model | data_fingerprints(config.data),
        )
        text = data_fingerprints(config.data) | ({"converse": self.converse.key} if self.converses else {})

        self.convert = Stage(
            "convert",
            self.run_dir / "convert",
            shown
            | {
                "mla": plain(config.mla),
                "calibration": plain(config.calibration),
                "data": {"sources": plain(config.data.sources), "seed": config.data.seed},  # its calibration text
            },
            model | text,
            unfinished=("unfinished",),  # of a conversion layer by layer (mha2mla/streaming.py)
        )
        # What a result does not depend on is not part of its key.
        sampled = without(plain(config.data), "num_workers")
        trained = without(plain(config.finetune), "log_every", "save_every", "keep_checkpoints")
        self.sample = Stage(
            "sample",
            self.model_dir / f"data-{config.data.name}",
            shown | {"data": sampled},
            model | text,
        )
        self.finetune = Stage(
            "finetune",
            self.run_dir / "finetune",
            {"finetune": trained},
            {"convert": self.convert.key, "sample": self.sample.key} | teacher_fingerprint(config),
            unfinished=("checkpoints",),
        )
        scores = {"eval": without(plain(config.eval), "batch_size", "baselines")}
        files = eval_fingerprints(config.eval)
        original = model | files | {"sample": self.sample.key}
        uncoded = {"eval": without(scores["eval"], "cache_bits")}
        self.original = Stage("original", self.model_dir / "original", uncoded, original)
        self.baselines = {name: self.baseline(name) for name in dict.fromkeys(config.eval.baselines)}
        self.evaluate = Stage("evaluate", self.run_dir / "evaluate", scores, files | {"finetune": self.finetune.key})
        self.report = Stage(
            "report",
            self.run_dir / "report",
            {"tracking": plain(config.tracking)},
            {"original": self.original.key, "evaluate": self.evaluate.key}
            | {stage.name: stage.key for stage in self.baselines.values()},
        )

        self.export = Stage(
            "export",
            self.run_dir / f"export-{config.export.form.value}",
            {"export": plain(config.export)},
            {"convert": self.convert.key}
            if config.export.stage is ExportStage.convert
            else {"finetune": self.finetune.key},
        )

    def baseline(self, name: str) -> Stage:
        """One quantised original: a stage for each, so that those of a model keep their scores when others join."""
        settings: dict[str, Any] = {"baseline": name}
        if baseline_bits(name)[0] == "transform":
            settings["calibration"] = plain(self.config.calibration)  # its text; the sources are in the original's key
        folder = self.model_dir / "baselines" / name
        return Stage(f"baselines/{name}", folder, settings, {"original": self.original.key})

    def check_apart(self) -> None:
        """What is written into the original's own folder would change its fingerprint."""
        source = Path(self.config.model.path).expanduser()
        if source.is_dir() and source.resolve() in (self.model_dir.resolve(), *self.model_dir.resolve().parents):
            raise ValueError(
                f"model.path={self.config.model.path} contains the folder that results go to ({self.model_dir}); "
                "give another output_dir or model.name"
            )

    @property
    def stages(self) -> list[Stage]:
        first = [self.converse] if self.converses else []
        scored = [self.original, *self.baselines.values(), self.evaluate]
        return [*first, self.convert, self.sample, self.finetune, *scored, self.report]


def write_result(config: Config, name: str, result: dict[str, Any]) -> Path:
    """A measurement that belongs to no point: `outputs/<model>/<name>.json`, which is returned."""
    path = Path(config.output_dir) / str(config.model.name) / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    print(f"written to {path}")
    return path


def without(settings: dict[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def teacher_fingerprint(config: Config) -> dict[str, str]:
    """Content of the model that distillation learns from; nothing for losses without a teacher."""
    distils = config.finetune.loss in DISTILLATION
    return {"teacher": model_fingerprint(teacher_config(config))} if distils else {}


def eval_fingerprints(settings: EvalConfig) -> dict[str, str]:
    """Content of the texts and rows that evaluation is told to read; ValueError if they are not there."""
    found = {}
    for name in ("data_dir", "perplexity_text", "benchmark_data"):
        given = getattr(settings, name)
        if given:
            path = data_folder(f"eval.{name}", given) if name == "benchmark_data" else Path(given).expanduser()
            try:
                found[name] = fingerprint(path)
            except FileNotFoundError as error:
                raise ValueError(f"eval.{name}: {error}") from error
    return found


def data_fingerprints(data: DataConfig) -> dict[str, str]:
    """Content of local corpora; hub datasets and the environment stand in the configuration by name."""
    return {
        f"{name}:{pattern}": fingerprint_pattern(pattern, name)
        for name, source in data.sources.items()
        for pattern in source.data_files
    }


def fingerprint_pattern(pattern: str, source: str) -> str:
    """Fingerprint of a file, a folder or all that a glob matches."""
    path = Path(pattern).expanduser()
    if path.exists():
        return fingerprint(path)
    parent = Path(path.anchor) if path.is_absolute() else Path()
    matches = sorted(parent.glob(str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)))
    if not matches:
        raise ValueError(f"data.sources.{source}.data_files: nothing matches {pattern}")
    return "+".join(fingerprint(match) for match in matches)
