"""Which launcher is picked, and what is refused before anything starts."""

import subprocess
import sys

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from conf.schema import Device, FinetuneConfig, LaunchConfig, Precision
from train.launch import cores, launch_command, start

PYTHON = [sys.executable, "-m"]


def test_one_process_is_plain_python():
    command, variables = launch_command(LaunchConfig(device=Device.cpu), "train.finetune", ["seed=1"])
    assert command == [*PYTHON, "train.finetune", "seed=1", "launch.num_processes=1"]
    assert variables == {}


def test_several_cpu_processes_go_through_torchrun(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    launch = LaunchConfig(num_processes=2, device=Device.cpu)
    command, variables = launch_command(launch, "train.finetune", ["launch.num_processes=2", "force=true"])
    torchrun = [*PYTHON, "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    assert command == [*torchrun, "-m", "train.finetune", "force=true", "launch.num_processes=2"]
    assert variables == {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": str(max(1, cores() // 2))}


def test_several_gpus_go_through_accelerate(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    command, variables = launch_command(LaunchConfig(), "train.finetune", ["model=x"])
    assert command[:3] == [*PYTHON, "accelerate.commands.launch"] and variables == {}
    parsed = launch_command_parser().parse_args(command[3:])
    assert (parsed.num_processes, parsed.multi_gpu, parsed.module) == (4, True, True)
    assert [parsed.training_script, *parsed.training_script_args] == [
        "train.finetune",
        "model=x",
        "launch.num_processes=4",
    ]
    with pytest.raises(ValueError, match="launch.num_processes=8, but torch sees 4 GPUs"):
        launch_command(LaunchConfig(num_processes=8), "train.finetune", [])
    on_cpu, _ = launch_command(LaunchConfig(num_processes=8, device=Device.cpu), "train.finetune", [])
    assert "torch.distributed.run" in on_cpu


def test_a_file_of_accelerate_config_decides(tmp_path):
    file = tmp_path / "fsdp.yaml"
    with pytest.raises(ValueError, match="no such file"):
        launch_command(LaunchConfig(accelerate_config=str(file)), "train.finetune", [])
    file.write_text("distributed_type: FSDP\n")
    command, _ = launch_command(LaunchConfig(accelerate_config=str(file)), "train.finetune", ["a=b"])
    assert command == [*PYTHON, "accelerate.commands.launch", "--config_file", str(file), "-m", "train.finetune", "a=b"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="these are the errors of a machine without CUDA")
def test_cuda_options_without_cuda_are_errors():
    with pytest.raises(ValueError, match="launch.device=cuda, but torch sees no CUDA"):
        launch_command(LaunchConfig(device=Device.cuda), "train.finetune", [])
    with pytest.raises(ValueError, match="launch.device=cuda, but torch sees no CUDA"):
        start(FinetuneConfig(), LaunchConfig(device=Device.cuda))
    with pytest.raises(ValueError, match="mixed_precision=fp16 needs CUDA"):
        start(FinetuneConfig(mixed_precision=Precision.fp16), LaunchConfig())


def test_compiling_on_the_cpu_needs_a_compiler(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="needs a C\\+\\+ compiler"):
        start(FinetuneConfig(torch_compile=True), LaunchConfig(device=Device.cpu))


def test_running_fewer_processes_than_asked_for_is_an_error():
    with pytest.raises(ValueError, match="2 processes were asked for .* runs in 1") as error:
        start(FinetuneConfig(), LaunchConfig(num_processes=2, device=Device.cpu))
    assert "ACCELERATE_USE_CPU=true" in str(error.value) and "--nproc_per_node 2" in str(error.value)


@pytest.mark.parametrize("wanted", ["null", "2"])
def test_accelerate_launch_on_the_cpu_does_not_shrink_silently(wanted):
    """`accelerate launch --cpu --num_processes 2` runs one process and says nothing."""
    script = (
        "from conf.schema import FinetuneConfig, LaunchConfig; from train.launch import start; "
        f"start(FinetuneConfig(), LaunchConfig(num_processes={None if wanted == 'null' else wanted}))"
    )
    words = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", "--no_python", sys.executable, "-c", script]
    done = subprocess.run([*PYTHON, *words], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "processes were asked for" in done.stderr and "torch.distributed.run" in done.stderr
