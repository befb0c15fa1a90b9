"""A converted checkpoint stands alone: loads with and without this package, bit for bit, and says so when broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForCausalLM

from mha2mla import ConversionOptions, convert
from tests.tiny import tiny_model, tokens

WITHOUT_PACKAGE = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoModel
folder, ids = sys.argv[1], torch.load(sys.argv[2])
torch.set_num_threads(int(sys.argv[4]))  # set, MKL takes so many; unset, no more than there are cores
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
base = AutoModel.from_pretrained(folder, trust_remote_code=True)
assert "mha2mla" not in sys.modules
with torch.no_grad():
    torch.save([model(ids).logits, base(ids)[0]], sys.argv[3])
"""


def saved(tmp_path: Path, family: str, **options: object) -> tuple[torch.nn.Module, Path]:
    model, _ = convert(tiny_model(family), ConversionOptions(rope_dim=8, kv_lora_rank=10, **options))
    model.save_pretrained(tmp_path / "converted")
    return model, tmp_path / "converted"


CASES = [("llama", {}), ("llama", {"q_lora_rank": 12}), ("qwen2", {}), ("qwen3", {"q_lora_rank": 12}), ("gpt_neox", {})]


@pytest.mark.parametrize(("family", "options"), CASES)
def test_round_trip_with_and_without_the_package(family: str, options: dict, tmp_path: Path) -> None:
    model, folder = saved(tmp_path, family, **options)
    with torch.no_grad():
        expected, hidden = model(tokens()).logits, model.base_model(tokens())[0]
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert type(loaded) is type(model)
        assert torch.equal(loaded(tokens()).logits, expected)
        assert torch.equal(AutoModel.from_pretrained(folder)(tokens())[0], hidden)

    torch.save(tokens(), tmp_path / "ids.pt")
    (tmp_path / "elsewhere").mkdir()
    environment = os.environ | {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    script = [sys.executable, "-P", "-c", block_package() + WITHOUT_PACKAGE]
    arguments = [str(folder), str(tmp_path / "ids.pt"), str(tmp_path / "out.pt"), str(torch.get_num_threads())]
    run = subprocess.run(
        script + arguments, cwd=tmp_path / "elsewhere", env=environment, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr[-2000:]
    remote, remote_hidden = torch.load(tmp_path / "out.pt")
    assert torch.equal(remote, expected)
    assert torch.equal(remote_hidden, hidden)


def block_package() -> str:
    """An import hook under which `mha2mla` cannot be found, as where it is not installed."""
    return (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] == 'mha2mla':\n"
        "            raise ModuleNotFoundError(f'{name} is blocked')\n"
        "sys.meta_path.insert(0, Blocked())\n"
    )


def test_checkpoint_keys_are_deepseeks(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "llama")
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", "pt") as file:
        layer = {
            k.removeprefix("model.layers.0.self_attn."): file.get_slice(k).get_shape()
            for k in file.keys()
            if ".0.self_attn" in k
        }  # noqa: E501, SIM118
    assert layer == {
        "q_proj.weight": [32, 32],
        "kv_a_proj_with_mqa.weight": [10 + 8, 32],
        "kv_b_proj.weight": [2 * (4 + 8), 10],
        "o_proj.weight": [32, 32],
        "rope_pair_index": [2, 2],
    }
    config = json.loads((folder / "config.json").read_text())
    assert config["auto_map"].keys() >= {"AutoConfig", "AutoModel", "AutoModelForCausalLM"}
    assert not list(folder.glob("*.bin"))


def test_which_pairs_rotate_is_loaded_not_recomputed(tmp_path: Path) -> None:
    """Control: two checkpoints that differ only in the kept pairs give different logits after loading."""
    results = []
    for name in ("high", "low"):
        model, _ = convert(tiny_model(), ConversionOptions(rope_dim=8, kv_lora_rank=24, partial_rope=name))
        model.save_pretrained(tmp_path / name)
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        with torch.no_grad():
            results.append(loaded(tokens()).logits)
            assert torch.equal(results[-1], model(tokens()).logits)
    assert not torch.allclose(*results, atol=1e-3)


def test_bfloat16_round_trip(tmp_path: Path) -> None:
    model, _ = convert(tiny_model().bfloat16(), ConversionOptions(rope_dim=8, kv_lora_rank=10))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert loaded.dtype == torch.bfloat16
    assert loaded.model.layers[0].self_attn.rope_pair_index.dtype == torch.int64
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)


def test_truncated_checkpoint_is_an_error(tmp_path: Path) -> None:
    _, folder = saved(tmp_path, "llama")
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(Exception, match="(?i)incomplete|metadata|header|buffer"):
        AutoModelForCausalLM.from_pretrained(folder)
