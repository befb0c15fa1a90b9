"""A checkpoint of safetensors files, one or many, read tensor by tensor and written file by file.

Reading holds nothing: a module asks for its own tensors. Fused experts are put together from the files that the hub has
them in, one expert at a time.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

INDEX = "model.safetensors.index.json"
EXPERT = re.compile(r"(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight")
PARTS = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}


class Shards:
    """The tensors of a checkpoint folder by name. ValueError names a file that is missing or broken."""

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        if (index := self.folder / INDEX).exists():
            self.files: dict[str, str] = json.loads(index.read_text())["weight_map"]
        elif not (self.folder / "model.safetensors").exists():
            raise ValueError(
                f"{self.folder} holds no safetensors: load that checkpoint and save it again with save_pretrained, or "
                "convert it in memory (launch.streamed=off)"
            )
        else:
            with self.open("model.safetensors") as file:
                self.files = dict.fromkeys(file.keys(), "model.safetensors")
        absent = sorted({name for name in self.files.values() if not (self.folder / name).exists()})
        if absent:
            raise ValueError(
                f"{self.folder} lacks {', '.join(absent[:3])} of its {len(set(self.files.values()))} files"
            )

    @contextmanager
    def open(self, name: str) -> Iterator[Any]:
        try:
            with safe_open(self.folder / name, "pt") as file:
                yield file
        except (OSError, SafetensorError) as error:
            raise ValueError(
                f"{self.folder / name} is no whole safetensors file ({error}); get that checkpoint again"
            ) from error

    def read(self, name: str) -> torch.Tensor:
        with self.open(self.files[name]) as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    def below(self, prefix: str) -> dict[str, str]:
        """Names under a prefix, by what follows it."""
        return {name.removeprefix(prefix): name for name in self.files if name.startswith(prefix)}

    def fill(self, module: nn.Module, prefix: str, dtype: torch.dtype, device: Any = "cpu") -> None:
        """Give a module on "meta" its own tensors, numbers in one dtype. ValueError if one is missing."""
        names, state = self.below(prefix), {}
        wanted = module.state_dict()
        for name, empty in wanted.items():
            if name in names:
                tensor = self.read(names[name])
            elif ".experts." in name:
                tensor = self.fused_experts(name, empty, names)
            elif "block_sparse_moe" in "".join(names) and name.startswith("mlp.gate"):
                tensor = self.read(names[name.replace("mlp.", "block_sparse_moe.")])
            else:
                raise ValueError(f"{self.folder} has no tensor {prefix}{name}, only such as {next(iter(self.files))}")
            state[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype)
        module.load_state_dict(state, assign=True)

    def fused_experts(self, name: str, empty: torch.Tensor, names: dict[str, str]) -> torch.Tensor:
        """`gate_up_proj` [E, 2 * n, d] or `down_proj` [E, d, n] of all experts, from a file's expert by expert."""
        parts: dict[str, dict[int, str]] = {}
        for short, whole in names.items():
            if found := EXPERT.fullmatch(short):
                parts.setdefault(PARTS.get(found[2], found[2]), {})[int(found[1])] = whole
        wanted = ("gate_proj", "up_proj") if name.endswith("gate_up_proj") else ("down_proj",)
        if any(len(parts.get(part, {})) != len(empty) for part in wanted):
            raise ValueError(f"{self.folder} has not all {len(empty)} experts of {name}")
        stack = [torch.cat([self.read(parts[part][index]) for part in wanted]) for index in range(len(empty))]
        return torch.stack(stack)


def write_shard(file: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A safetensors file that appears when whole; OSError if it cannot be written, and nothing of it is left."""
    temporary = file.with_name(file.name + ".tmp")
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        save_file(whole, temporary, {"format": "pt"})
    except (OSError, SafetensorError) as error:
        temporary.unlink(missing_ok=True)
        raise OSError(
            f"could not write {file} ({error}). If the disk is full, make room, and run the same command again"
        ) from error
    plain_permissions(temporary)
    temporary.replace(file)


def plain_permissions(*paths: Path) -> None:
    """Give files, and those of folders, the permissions of new ones: safetensors writes them for their owner alone."""
    for path in paths:
        folder = path if path.is_dir() else path.parent
        probe = folder / f".{os.getpid()}.permissions"  # shows the umask without changing it for other threads
        probe.touch(exist_ok=False)
        mode = probe.stat().st_mode & 0o777
        probe.unlink()
        for file in [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]:
            file.chmod(mode)


def write_index(folder: Path, files: list[Path]) -> None:
    """The index over these files of a checkpoint."""
    weights, size = {}, 0
    for path in files:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  no dictionary
                weights[name] = path.name
        size += path.stat().st_size
    text = json.dumps({"metadata": {"total_size": size}, "weight_map": weights}, indent=2)
    (folder / INDEX).write_text(text + "\n")


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made within get parameters on "meta" and real buffers: a model's skeleton."""
    register = nn.Module.register_parameter

    def on_meta(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(self, name, parameter)
        if parameter is not None and parameter.device.type != "meta":
            kept = self._parameters[name]
            assert kept is not None
            self._parameters[name] = type(kept)(kept.to("meta"), requires_grad=kept.requires_grad)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
