"""A model is loaded in one way: what the checkpoint holds, or an error that names the difference."""

import ast
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from conf.checkpoint import load_model
from tests.tiny import tiny_model, tokens

ROOT = Path(__file__).parents[2]
NO_MODELS = {"AutoConfig", "AutoTokenizer", "GenerationConfig"}  # what else has a `from_pretrained`


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model().save_pretrained(tmp_path)
    return tmp_path


def change(folder: Path, **tensors: torch.Tensor | None) -> None:
    """Add, replace or (None) remove tensors of a checkpoint."""
    file = folder / "model.safetensors"
    found = load_file(file) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    save_file({name: tensor for name, tensor in found.items() if tensor is not None}, file, {"format": "pt"})


def test_a_complete_checkpoint_is_loaded_as_it_is(folder: Path) -> None:
    model = load_model(folder, "auto")
    assert torch.equal(model(tokens()).logits, tiny_model()(tokens()).logits)
    assert not model.training and model.dtype == torch.float32
    assert load_model(folder, torch.bfloat16).dtype == torch.bfloat16
    assert load_model(folder, "auto", device="meta").device.type == "meta"


def test_what_is_missing_is_named(folder: Path) -> None:
    change(folder, model__norm__weight=None)
    with pytest.raises(ValueError, match=r"lacks 1 weight \(model.norm.weight\); make it again"):
        load_model(folder, "auto")


def test_what_is_not_the_model_s_is_named(folder: Path) -> None:
    change(folder, value_head__weight=torch.ones(3), model__layers__2__mlp__up_proj__weight=torch.ones(48, 32))
    with pytest.raises(ValueError, match=r"holds besides its model 2 weights \(model.layers.2.mlp.up_proj.weight, val"):
        load_model(folder, "auto")


def test_what_has_another_shape_is_named(folder: Path) -> None:
    change(folder, model__norm__weight=torch.ones(31))
    with pytest.raises(ValueError, match="model.norm.weight"):
        load_model(folder, "auto")


def test_a_file_cut_short_and_an_empty_folder_are_one_line(folder: Path, tmp_path: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    for place in (folder, tmp_path / "nothing"):
        with pytest.raises(ValueError, match="holds no complete checkpoint.*; do that") as found:
            load_model(place, "auto", "do that")
        assert "\n" not in str(found.value)


def test_revision_and_class_are_handed_on() -> None:
    asked: dict[str, Any] = {}

    class Recorder:
        @staticmethod
        def from_pretrained(path: str, **options: Any) -> Any:
            asked.update(options, path=path)
            return tiny_model(), {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}

    load_model("org/name", "auto", revision="v2", model_class=Recorder)
    assert asked["path"] == "org/name" and asked["revision"] == "v2"
    load_model("org/name", "auto", model_class=Recorder)
    assert asked["revision"] == "main"


def loads(file: Path) -> list[str]:
    """`X.from_pretrained` of anything that may be a model."""
    return [
        f"{file.relative_to(ROOT)}:{node.lineno}"
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.Attribute)
        and node.attr == "from_pretrained"
        and not (isinstance(node.value, ast.Name) and node.value.id in NO_MODELS)
    ]


def test_no_other_place_loads_a_model() -> None:
    files = [file for folder in ("mha2mla", "conf", "data", "train", "eval") for file in (ROOT / folder).rglob("*.py")]
    found = [place for file in files for place in loads(file)]
    assert len(files) > 80 and [place.split(":")[0] for place in found] == ["conf/checkpoint.py"], found
