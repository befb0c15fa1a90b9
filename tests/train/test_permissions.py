"""Files of a checkpoint get the permissions that the umask gives, as all other files do."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from conf.schema import FinetuneConfig, Sharding
from mha2mla.shards import write_shard
from tests.train.tiny import write_model
from train.checkpoint import Progress, save_checkpoint
from train.model import save_model, trainable_model
from train.sharding import WholeStates


@pytest.fixture(params=[0o022, 0o027, 0o002])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def assert_plain(folder: Path, umask: int) -> None:
    files = [file for file in folder.rglob("*") if file.is_file()]
    assert files and any(file.suffix in (".safetensors", ".bin") for file in files)
    odd = {file.name: oct(file.stat().st_mode) for file in files if file.stat().st_mode & 0o777 != 0o666 & ~umask}
    assert not odd and not list(folder.rglob("*.permissions"))


def test_a_converted_a_healed_and_a_running_models_files(umask: int, tmp_path: Path) -> None:
    source = write_model(tmp_path / "pretrained")
    config, accelerator = FinetuneConfig(), Accelerator(cpu=True)
    model = trainable_model(source, config)
    (tmp_path / "healed").mkdir()
    save_model(accelerator, model, source, tmp_path / "healed", config)
    assert_plain(tmp_path / "healed", umask)

    optimizer = torch.optim.AdamW(model.parameters())
    accelerator.prepare(model, optimizer)
    save_checkpoint(accelerator, WholeStates(accelerator, Sharding.none), Progress(), tmp_path / "checkpoints", 1)
    assert_plain(tmp_path / "checkpoints", umask)

    (tmp_path / "streamed").mkdir(mode=0o700)
    write_shard(tmp_path / "streamed" / "model-1.safetensors", {"x": torch.zeros(2)})
    assert_plain(tmp_path / "streamed", umask)
