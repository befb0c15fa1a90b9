"""Sharing weights and moments out changes nothing but where they lie; any number of processes goes on from there."""

import shutil

import pytest
import torch
from accelerate.commands.launch import launch_command_parser

from conf.schema import Device, FinetuneConfig, LaunchConfig, Precision, Sharding
from conf.stage import Stage
from mha2mla import ConversionOptions, convert
from tests.conf.test_configs import composed
from tests.tiny import FAMILIES, tiny_model
from tests.train.test_finetune_restart import STEPS, Project
from tests.train.tiny import composed as in_training
from train import pipeline
from train.finetune import run
from train.launch import launch_command, start
from train.sharding import deepspeed_plugin, fsdp_plugin, plugins, units

SHARDED = "launch.sharding=fsdp2"


def test_two_sharded_processes_train_like_one(tmp_path):
    options = {"max_steps": 12, "micro_batch_size": 1}  # two micro-batches a step on each process
    two = Project(tmp_path / "two", **options)
    process = two.start("launch.num_processes=2", SHARDED)
    output = process.communicate()[0]
    assert process.returncode == 0, output
    one, control = Project(tmp_path / "one", **options), Project(tmp_path / "control", **options, seed=1)
    weights, _ = one.run_here(), control.run_here()
    torch.testing.assert_close(two.curve(), one.curve(), rtol=1e-4, atol=0)
    torch.testing.assert_close(two.weights(), weights, rtol=0, atol=1e-4)
    assert (control.curve() / one.curve() - 1).abs().max() > 0.05


def test_a_sharded_checkpoint_goes_on_in_one_process_and_back_in_two(tmp_path):
    options = {"save_every": 5, "micro_batch_size": 1}
    project = Project(tmp_path / "killed", **options)
    project.kill_at(project.start("launch.num_processes=2", SHARDED), 8)
    [*_, last] = sorted((project.folder / "checkpoints").glob("step-??????"))
    parts = [file.stat().st_size for file in (last / "states").glob("*.distcp")]
    assert len(parts) == 2 and min(parts) > 0.3 * sum(parts)  # each process wrote its own half
    project.kill_at(project.start("launch.num_processes=1", SHARDED), 25)
    process = project.start("launch.num_processes=2", SHARDED)
    output = process.communicate()[0]
    assert process.returncode == 0 and "going on after step" in output and "step 1/60" not in output, output
    assert project.plan.finetune.record()["metrics"]["steps"] == STEPS
    whole = Project(tmp_path / "whole", **options)
    torch.testing.assert_close(project.weights(), whole.run_here(), rtol=0, atol=3e-4)
    assert [row["step"] for row in project.history()["train"]] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_names_its_layers_for_sharing(family):
    model = tiny_model(family, 4 if family == "gpt_neox" else 2)
    converted, _ = convert(model, ConversionOptions(reduction=0.5))
    assert [id(unit) for unit in units(converted)] == [id(layer) for layer in converted.base_model.layers]


@pytest.mark.parametrize("name", ["auto", "ddp", "cpu2", "fsdp2", "zero3"])
def test_launch_groups_compose(name):
    launch = composed(f"launch={name}").launch
    expected = {"fsdp2": Sharding.fsdp2, "zero3": Sharding.zero3}.get(name, Sharding.none)
    assert launch.sharding is expected


def test_accelerate_takes_both_plugins(monkeypatch):
    plugin = fsdp_plugin()
    assert plugin.fsdp_version == 2 and plugin.reshard_after_forward
    model, _ = convert(tiny_model(), ConversionOptions(reduction=0.5))
    plugin.set_auto_wrap_policy(model)
    assert plugin.auto_wrap_policy.keywords["transformer_layer_cls"] == {type(unit) for unit in units(model)}
    zero = deepspeed_plugin(FinetuneConfig(max_grad_norm=0.7, micro_batch_size=2)).deepspeed_config
    assert zero["zero_optimization"]["stage"] == 3 and zero["gradient_clipping"] == 0.7
    assert zero["gradient_accumulation_steps"] == 1 and zero["train_micro_batch_size_per_gpu"] == 2


def test_several_machines_meet_at_the_first(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    launch = LaunchConfig(num_processes=16, num_machines=2, machine_rank=1, main_process_ip="10.0.0.1")
    command, _ = launch_command(launch, "train.finetune", ["a=b"])
    parsed = launch_command_parser().parse_args(command[3:])
    assert (parsed.num_machines, parsed.machine_rank, parsed.num_processes) == (2, 1, 16)
    assert (parsed.main_process_ip, parsed.main_process_port) == ("10.0.0.1", 29500)
    launch.device = Device.cpu
    command, _ = launch_command(launch, "train.finetune", [])
    assert "--nnodes 2 --node_rank 1 --master_addr 10.0.0.1" in " ".join(command) and "--nproc_per_node 8" in " ".join(
        command
    )


def test_a_checkpoint_of_another_kind_or_broken_is_named(tmp_path):
    project = Project(tmp_path, save_every=5)
    project.kill_at(project.start(), 8)
    with pytest.raises(ValueError, match="launch.sharding=none, this is launch.sharding=fsdp2.*remove that folder"):
        run(in_training([*project.words, SHARDED]))
    folder = project.folder / "checkpoints"
    shutil.rmtree(project.folder)
    project.kill_at(project.start(SHARDED), 8)
    for file in folder.glob("step-*/states/*.distcp"):
        file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(ValueError, match="cannot resume from .*remove that folder and start again"):
        run(in_training([*project.words, SHARDED]))


def test_machines_beside_the_first_only_join_the_training(tmp_path, monkeypatch, capsys):
    words = ["launch.num_machines=2", "launch.num_processes=2", "launch.machine_rank=1", "launch.main_process_ip=a"]
    config = composed("model.path=org/name", f"output_dir={tmp_path}", "data.tokens=4096", *words)
    ran, finished = [], []
    monkeypatch.setattr(Stage, "record", lambda self: {"seconds": 1} if self.name in finished else None)
    monkeypatch.setattr(pipeline.time, "sleep", lambda seconds: finished.append(["convert", "sample"][len(finished)]))
    monkeypatch.setattr(pipeline, "run_stage", lambda stage, *_: ran.append(stage.name))
    pipeline.run_point(config, words)
    assert ran == ["finetune"] and finished == ["convert", "sample"]
    assert "waiting for machine 0 to finish 'convert'" in capsys.readouterr().out


WRONG = {
    "zero3 needs GPUs": ["launch.sharding=zero3", "launch.device=cpu"],
    "machine_rank=2 must lie in 0..1": ["launch.num_machines=2", "launch.machine_rank=2"],
    "needs launch.main_process_ip": ["launch.num_machines=2", "launch.num_processes=2"],
    "a multiple of launch.num_machines=2": [
        "launch.num_machines=2",
        "launch.num_processes=3",
        "launch.main_process_ip=a",
    ],
}


@pytest.mark.parametrize("message", WRONG)
def test_what_cannot_be_shared_is_refused(message):
    with pytest.raises(ValueError, match=message):
        config = composed(*WRONG[message])
        start(config.finetune, config.launch)


def test_zero3_without_deepspeed_and_sharing_in_fp16_say_so(monkeypatch):
    with pytest.raises(ValueError, match="sharding=fsdp2 does not train in fp16"):
        plugins(Sharding.fsdp2, FinetuneConfig(mixed_precision=Precision.fp16), on_cpu=False)
    monkeypatch.setattr("train.sharding.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="needs the package deepspeed"):
        plugins(Sharding.zero3, FinetuneConfig(), on_cpu=False)
