"""A stage's folder: when it counts as finished, when it is run again, how it is written.

A stage writes `config.yaml` first and `stage.json` last, atomically. The record carries a key made from
the stage's configuration and the fingerprints of its inputs. The same key: finished, not run again. A
different key, or no record: what lies there is moved aside (never deleted, never taken for finished) and
the stage runs. A resumable stage that was killed finds its unfinished folder of the same key as it left it.
No torch in here: the pipeline decides what to skip without loading it.
"""

import hashlib
import itertools
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

try:
    import fcntl
except ImportError:  # Windows: nothing is locked
    fcntl = None  # type: ignore[assignment]

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "peft", "hydra-core", "wandb")
TEMPORARY = ".tmp"  # ends the name of a folder that is being written
KEY_FILE = ".key"  # marks an unfinished folder with the key of the run that is filling it


def digest(value: Any) -> str:
    """Short hash of anything JSON can hold, independent of dictionary order."""
    text = json.dumps(value, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint(path: str | Path) -> str:
    """Hash of a file or of all files below a folder: names, sizes, and the first and last MiB of each."""
    path = Path(path)
    files = [path] if path.is_file() else sorted(f for f in path.rglob("*") if f.is_file())
    if not files:
        raise FileNotFoundError(f"{path} does not exist or is empty")
    sha, edge = hashlib.sha256(), 1 << 20
    for file in files:
        size = file.stat().st_size
        sha.update(f"{file.relative_to(path) if path.is_dir() else file.name}:{size};".encode())
        with file.open("rb") as stream:
            sha.update(stream.read(edge))
            if size > edge:
                stream.seek(max(edge, size - edge))
                sha.update(stream.read(edge))
    return sha.hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the whole new one, never half of it."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w") as stream:
        json.dump(value, stream, indent=2, default=str)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


@contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A temporary folder that gets its name when whole; if writing fails (a full disk) nothing is left of it."""
    temporary = folder.with_name(folder.name + TEMPORARY)
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(parents=True)
    try:
        yield temporary
    except Exception as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, ValueError):  # not of the disk, and it says itself what is wrong
            raise
        raise OSError(
            f"could not write {folder} ({type(error).__name__}: {error}); nothing of it was kept. "
            "If the disk is full, make room, and run the same command again"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    temporary.rename(folder)


@dataclass
class Stage:
    """One stage of one run: `name`, its `folder`, the `config` it obeys and its inputs' fingerprints.

    `unfinished` names folders in it that a restart needs until the stage is sealed, and nothing does afterwards.
    """

    name: str
    folder: Path
    config: dict[str, Any]
    inputs: dict[str, str]
    metrics: dict[str, Any] = field(default_factory=dict)
    unfinished: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        return digest({"stage": self.name, "config": self.config, "inputs": self.inputs})

    def record(self) -> dict[str, Any] | None:
        """The record of a finished run with this very key, or None."""
        record = read_record(self.folder)
        return record if record and record["key"] == self.key else None

    def require_finished(self) -> dict[str, Any]:
        record = self.record()
        if record is None:
            found = read_record(self.folder)
            state = "was made with another configuration" if found else "has not finished"
            target = "evaluate" if self.name.startswith(("original", "baselines/")) else self.name
            raise FileNotFoundError(
                f"stage '{self.name}' in {self.folder} {state}; run `make {target}` with the same options first"
            )
        return record

    def skip(self, force: bool = False) -> bool:
        """True, with a line that says so, if there is nothing to do."""
        record = None if force else self.record()
        if record:
            self._clear()  # where a kill came between the record and this
            print(f"{self.name}: finished in {self.folder} ({record['seconds']:.0f} s), skipped", flush=True)
        return record is not None

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other pipeline makes this stage: points of a sweep that run side by side share some."""
        if fcntl is None:
            yield
            return
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with (self.folder.parent / f".{self.folder.name}.lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                print(f"{self.name}: another run is making {self.folder}, waiting for it", flush=True)
                fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    @contextmanager
    def run(self, resumable: bool = False, force: bool = False, main: bool = True) -> Iterator["Stage"]:
        """Prepare the folder, hand it over, and seal it with `stage.json` if the body raises nothing.

        `main=False` is for the other ranks of a distributed stage: they see the folder and write nothing.
        """
        started = time.time()
        if main:
            self._prepare(resumable and not force)
        try:
            yield self
        except BaseException:
            if main and {path.name for path in self.folder.iterdir()} <= {KEY_FILE, "config.yaml"}:
                shutil.rmtree(self.folder)  # nothing was made: leave nothing behind
            raise
        if main:
            write_json(
                self.folder / "stage.json",
                {
                    "stage": self.name,
                    "key": self.key,
                    "inputs": self.inputs,
                    "metrics": self.metrics,
                    "seconds": round(time.time() - started, 1),
                    "finished": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
                    "provenance": provenance(),
                },
            )
            self._clear()

    def _clear(self) -> None:
        """Remove what only an unfinished run needs."""
        for name in self.unfinished:
            shutil.rmtree(self.folder / name, ignore_errors=True)
        (self.folder / KEY_FILE).unlink(missing_ok=True)

    def _prepare(self, keep_unfinished: bool) -> None:
        marker = self.folder / KEY_FILE
        unfinished = marker.read_text() if marker.exists() and not read_record(self.folder) else None
        if self.folder.exists() and unfinished == self.key:
            if not keep_unfinished:
                shutil.rmtree(self.folder)
        elif self.folder.exists() and any(self.folder.iterdir()):
            aside = aside_of(self.folder)
            self.folder.rename(aside)
            changed = differences(aside / "config.yaml", self.config)
            reason = f" ({', '.join(changed)})" if changed else ""
            print(f"{self.name}: kept the earlier {self.folder} as {aside.name}{reason}", flush=True)
        self.folder.mkdir(parents=True, exist_ok=True)
        marker.write_text(self.key)
        (self.folder / "config.yaml").write_text(yaml.safe_dump(self.config, sort_keys=False))


def aside_of(folder: Path) -> Path:
    """Where a folder is kept when another takes its place: named after the time, and no folder that is there."""
    name = f"{folder.name}.old-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"
    names = (name + (f"-{number}" if number else "") for number in itertools.count())
    return next(path for path in map(folder.with_name, names) if not path.exists())


def differences(file: Path, config: dict[str, Any], most: int = 6) -> list[str]:
    """`key: old -> new` of every setting in which a stage's file differs from a configuration, the first few."""

    def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
        if not isinstance(settings, dict):
            return {prefix: settings}
        return {
            key: value
            for name, part in settings.items()
            for key, value in flat(part, f"{prefix}.{name}" if prefix else str(name)).items()
        }

    try:
        before, after = flat(yaml.safe_load(file.read_text()) or {}), flat(config)
    except (OSError, yaml.YAMLError):
        return []
    names = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    found = [f"{name}: {before.get(name, 'unset')} -> {after.get(name, 'unset')}" for name in names]
    return found[:most] + ([f"and {len(found) - most} more"] if len(found) > most else [])


def read_record(folder: Path) -> dict[str, Any] | None:
    """`stage.json` of a folder if it is there and whole."""
    try:
        return json.loads((folder / "stage.json").read_text())
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return None


def provenance() -> dict[str, Any]:
    """Versions, git commit and hardware, for every record and result."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {"versions": versions, "commit": git_commit(), "hardware": hardware()}


def git_commit() -> str | None:
    """HEAD, with a `+` where tracked files differ from it; None outside a checkout."""

    def git(*words: str) -> str:
        root = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        dirty = "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + dirty
    except (OSError, subprocess.CalledProcessError):
        return None


def hardware() -> dict[str, Any]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    facts: dict[str, Any] = {"machine": platform.machine(), "cores": cores}
    if hasattr(os, "sysconf"):
        facts["memory_gib"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    cpu = Path("/proc/cpuinfo")
    if cpu.exists():
        lines = dict(line.split(":", 1) for line in cpu.read_text().split("\n\n")[0].splitlines() if ":" in line)
        named = {name.strip(): value.strip() for name, value in lines.items()}
        facts["cpu"] = named.get("model name", "unknown")
        facts["bfloat16"] = bool({"avx512_bf16", "amx_bf16"} & set(named.get("flags", "").split()))
    gpus = shutil.which("nvidia-smi")
    if gpus:
        listed = subprocess.run(
            [gpus, "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, check=False
        )
        facts["gpus"] = listed.stdout.split("\n")[:-1]
    return facts
