"""vLLM's own matcher recognises the exported attention (`make test-serving`, in an environment with vLLM)."""

import os
import subprocess
from pathlib import Path

import pytest

from mha2mla.native import to_deepseek
from mha2mla.served import to_served
from tests.mha2mla.test_export import SERVED, converted

pytestmark = pytest.mark.serving

MATCH = """
import sys, torch
from transformers import AutoConfig, AutoModel
from vllm.model_executor.models.transformers.fusers.mla import MLAFuser
from vllm.model_executor.models.transformers.fx_utils import trace
for folder in sys.argv[1:]:
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    with torch.device("meta"):
        model = AutoModel.from_config(config, trust_remote_code=True)
    attention = model.layers[0].self_attn
    found = MLAFuser.match(trace(attention), attention)
    if found is not None:
        found.update_forward(attention)  # the rewritten forward hands the latent itself to the engine
    names = found and (found.kv_a_layernorm_name, found.kv_b_proj_name, found.o_proj_name)
    print("MATCH", folder.rsplit("/", 1)[-1], config.kv_lora_rank, names and " ".join(names))
"""


def test_every_serving_form_is_recognised_and_a_plain_conversion_is_not(tmp_path: Path) -> None:
    folders = []
    for family in sorted(SERVED):
        folders.append(tmp_path / family)
        to_served(converted(family)).save_pretrained(folders[-1])
    folders += [tmp_path / "native", tmp_path / "plain"]
    to_deepseek(converted()).save_pretrained(tmp_path / "native")
    converted().save_pretrained(tmp_path / "plain")
    python = os.environ.get("VLLM_PYTHON")
    assert python, "VLLM_PYTHON=<python of an environment with vLLM>; `make test-serving` sets it up"
    environment = {"PATH": os.environ["PATH"], "HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "1"}
    environment |= {"CUDA_VISIBLE_DEVICES": "", "VLLM_LOGGING_LEVEL": "ERROR"}
    command = [python, "-c", MATCH, *map(str, folders)]
    run = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-3000:]
    found = [line.split(maxsplit=3) for line in run.stdout.splitlines() if line.startswith("MATCH")]
    matched = "kv_a_layernorm kv_b_proj o_proj"
    assert {name: names for _, name, _, names in found} == {
        **dict.fromkeys([*SERVED, "native"], matched),
        "plain": "None",
    }
    assert {rank for _, _, rank, _ in found} == {"12"}
