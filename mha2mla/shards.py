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

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
REMEDY = "get that checkpoint again, or convert it in memory (launch.streamed=off)"
FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
DERIVED = (r"rotary_emb\.inv_freq$",)  # in old checkpoints; follows from the configuration
ROWS = 4096  # of an embedding, that are compared at once


class Shards:
    """The tensors of a checkpoint folder by the names that `model` has for them: a skeleton without weights.

    Which files are read, what their tensors are called and in what dtype the model is, is decided as transformers does.
    ValueError names a file that is missing or broken, and the tensors that are missing, not the model's or misshapen.
    """

    def __init__(self, folder: Path | str, model: Any) -> None:
        self.folder = Path(folder)
        stored = weight_files(self.folder, getattr(model.config, "transformers_weights", None))
        absent = sorted({name for name in stored.values() if not (self.folder / name).exists()})
        if absent:
            raise ValueError(f"{self.folder} lacks {', '.join(absent[:3])} of its {len(set(stored.values()))} files")
        wanted, prefix = model.state_dict(), f"{model.base_model_prefix}."
        # A checkpoint of the decoder alone calls everything the same but for the prefix.
        self.stored = {
            name if name in wanted or name.startswith(prefix) else prefix + name: (name, file)
            for name, file in stored.items()
        }
        self.shared = self.shared_names(model)
        self.dtype = self.stored_dtype(model.config)
        self.check(wanted, model)

    @property
    def tied(self) -> bool:
        """Whether output layer and embedding are one weight."""
        return bool(self.shared)

    @property
    def files(self) -> set[str]:
        return {file for _, file in self.stored.values()}

    def shared_names(self, model: Any) -> dict[str, str]:
        """Of two names of a tied weight the one that is read for the other. What the files hold decides, whatever the
        configuration says: two that differ are two weights."""
        if not model.config.tie_word_embeddings:
            return {}
        named = {module: name for name, module in model.named_modules()}
        embedding, head = (
            f"{named[module]}.weight" for module in (model.get_input_embeddings(), model.get_output_embeddings())
        )
        if embedding in self.stored and head in self.stored:
            return {head: embedding} if self.equal(embedding, head) else {}
        return {embedding: head} if head in self.stored else {head: embedding}

    def equal(self, first: str, second: str) -> bool:
        """Whether two stored tensors hold the same numbers; compared some rows at a time."""
        with self.sliced(first) as one, self.sliced(second) as other:
            if one.get_shape() != other.get_shape() or one.get_dtype() != other.get_dtype():
                return False
            rows = range(0, one.get_shape()[0], ROWS)
            return all(torch.equal(one[at : at + ROWS], other[at : at + ROWS]) for at in rows)

    def stored_dtype(self, config: Any) -> torch.dtype:
        """The dtype that the configuration names, else that of the first numbers in the first file."""
        dtype = getattr(config, "dtype", None)
        if dtype is None:
            with opened_file(self.folder / min(self.files)) as file:
                found = (file.get_slice(name).get_dtype() for name in file.keys())  # noqa: SIM118  no dictionary
                dtype = next((FLOATS[each] for each in found if each in FLOATS), torch.float32)
        return getattr(torch, dtype) if isinstance(dtype, str) else dtype

    def check(self, wanted: dict[str, torch.Tensor], model: Any) -> None:
        """ValueError unless the files hold this model's tensors and no others."""
        parts = {name: self.parts(name, len(empty) if empty.dim() else 0) for name, empty in wanted.items()}
        if missing := sorted(name for name, found in parts.items() if not found):
            raise ValueError(f"{self.folder} lacks {listed(missing)}; {REMEDY}")
        used = {part for found in parts.values() for part in found} | set(self.shared)
        ignored = re.compile("|".join([*(model._keys_to_ignore_on_load_unexpected or ()), *DERIVED]))
        others = [own for name, (own, _) in self.stored.items() if name not in used and not ignored.search(own)]
        if others:
            raise ValueError(f"{self.folder} holds besides its model {listed(sorted(others))}; {REMEDY}")
        for name, empty in wanted.items():
            with self.sliced(parts[name][0]) as tensor:
                if len(parts[name]) == 1 and (shape := tuple(tensor.get_shape())) != tuple(empty.shape):
                    raise ValueError(f"{self.folder} has {name} as {shape}, its configuration as {tuple(empty.shape)}")

    def parts(self, name: str, experts: int = 0) -> list[str]:
        """What in the files makes up the model's tensor: itself, or the parts of fused experts; empty if missing."""
        name = self.shared.get(name, name)
        if name in self.stored:
            return [name]
        block, _, last = name.rpartition("mlp.")
        if (router := f"{block}block_sparse_moe.{last}") in self.stored:
            return [router]
        if not last.startswith("experts."):
            return []
        inner, outer = (("gate_proj", "w1"), ("up_proj", "w3")), (("down_proj", "w2"),)
        for place, column in (("mlp", 0), ("block_sparse_moe", 1)):
            kinds = [each[column] for each in (inner if last.endswith("gate_up_proj") else outer)]
            found = [f"{block}{place}.experts.{index}.{kind}.weight" for index in range(experts) for kind in kinds]
            if all(part in self.stored for part in found):
                return found
        return []

    @contextmanager
    def sliced(self, name: str) -> Iterator[Any]:
        own, file = self.stored[name]
        with opened_file(self.folder / file) as opened:
            yield opened.get_slice(own)

    def read(self, name: str, experts: int = 0) -> torch.Tensor:
        """The model's tensor of this name, numbers in the model's dtype."""
        found = []
        for part in self.parts(name, experts):
            own, file = self.stored[part]
            with opened_file(self.folder / file) as opened:
                tensor: torch.Tensor = opened.get_tensor(own)
                found.append(tensor.to(self.dtype) if tensor.is_floating_point() else tensor)
        if len(found) == 1:
            return found[0]
        return torch.stack([torch.cat(each) for each in batched(found, len(found) // experts)])

    def fill(self, module: nn.Module, prefix: str, device: Any = "cpu") -> None:
        """Give a module on "meta" its own tensors."""
        state = {
            name: self.read(prefix + name, len(empty) if empty.dim() else 0).to(device)
            for name, empty in module.state_dict().items()
        }
        module.load_state_dict(state, assign=True)


@contextmanager
def opened_file(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} is no complete safetensors file ({error}); {REMEDY}") from error


def weight_files(folder: Path, named: str | None) -> dict[str, str]:
    """The file of every tensor: of the file or index that the configuration names, of `model.safetensors`, or of the
    index, in the order in which transformers looks for them."""
    file = named or (SINGLE if (folder / SINGLE).exists() else INDEX)
    if not (folder / file).exists():
        shards = sorted(path.name for path in folder.glob("*.safetensors"))
        if shards:
            raise ValueError(f"{folder} has {len(shards)} safetensors files ({shards[0]}) but no {file}; {REMEDY}")
        raise ValueError(
            f"{folder} holds no safetensors: load that checkpoint and save it again with save_pretrained, or "
            "convert it in memory (launch.streamed=off)"
        )
    if not file.endswith(".json"):
        with opened_file(folder / file) as opened:
            return dict.fromkeys(opened.keys(), file)
    try:
        files = json.loads((folder / file).read_text(encoding="utf-8"))["weight_map"]
        return {str(name): str(shard) for name, shard in files.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{folder / file} is no index of a checkpoint ({error!r}); {REMEDY}") from error


def listed(names: list[str], what: str = "tensor") -> str:
    """How many of them, and the first."""
    shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
    return f"{len(names)} {what}{'s' * (len(names) > 1)} ({shown})"


def batched(items: list[Any], size: int) -> list[list[Any]]:
    return [items[at : at + size] for at in range(0, len(items), size)]


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
