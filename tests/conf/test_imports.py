"""Imports point one way: the pipeline's folders to the library, training and evaluation not to each other."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OURS = {"mha2mla", "conf", "data", "train", "eval", "docs", "tests"}
ALLOWED = {
    "mha2mla": {"mha2mla"},
    "conf": {"conf", "mha2mla"},
    "data": {"data", "conf", "mha2mla"},
    "train": {"train", "data", "conf", "mha2mla"},
    "eval": {"eval", "data", "conf", "mha2mla"},
}


def imported(file: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("folder", ALLOWED)
def test_folders_import_what_lies_below_them(folder: str) -> None:
    files = sorted((ROOT / folder).rglob("*.py"))
    wrong = {str(file.relative_to(ROOT)): imported(file) & OURS - ALLOWED[folder] for file in files}
    assert files and not {file: names for file, names in wrong.items() if names}


def test_the_library_needs_torch_and_transformers_alone() -> None:
    heavy = {"hydra", "datasets", "accelerate", "peft", "wandb", "lm_eval", "rich", "tqdm", "matplotlib"}
    assert not {file.name for file in (ROOT / "mha2mla").rglob("*.py") if imported(file) & heavy}
