"""On a CUDA device: conversion, losses, decoding and fine-tuning are those of the CPU. `pytest -m gpu`."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

from conf.schema import Device, FinetuneConfig, LaunchConfig, Precision
from mha2mla import ConversionOptions, collect_statistics, convert, reconstruct
from tests.tiny import preset, relative, tiny_model, tokens
from tests.train.tiny import VOCAB, write_data, write_model
from train.batches import PackedRows
from train.finetune import finetune
from train.launch import start
from train.losses import LOSSES, loss_function

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
MLA = ConversionOptions(rope_dim=8, kv_lora_rank=10)


@pytest.fixture(autouse=True)
def exact_products():
    torch.backends.cuda.matmul.allow_tf32 = False


@pytest.mark.parametrize("method", ["mha2mla", "transmla", "care", "best"])
def test_conversion_is_that_of_the_cpu(method):
    options = ConversionOptions(**(preset(method) | {"rope_dim": 8, "kv_lora_rank": 12}))
    model, text = tiny_model(), [tokens(4, 64, seed=n) for n in range(4)]

    def converted_on(device: str):
        original = tiny_model().to(device)
        converted, _ = convert(original, options, collect_statistics(original, text))
        before = converted(tokens().to(device)).logits.cpu()
        fits = reconstruct(original, converted, text, steps=10)
        return before, converted(tokens().to(device)).logits.cpu(), fits

    with torch.no_grad():
        original = model(tokens()).logits
    (before, after, fits), (gpu_before, gpu_after, gpu_fits) = converted_on("cpu"), converted_on("cuda")
    assert relative(gpu_before, before) < 1e-2 * relative(before, original)
    assert relative(gpu_after, after) < 0.1 * relative(after, original)
    for ours, theirs in zip(gpu_fits, fits, strict=True):
        assert ours.after == pytest.approx(theirs.after, rel=0.02) and ours.after < ours.before


@pytest.mark.parametrize("loss", LOSSES)
def test_loss_and_gradients_are_those_of_the_cpu(loss, tmp_path):
    student = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "student", dropout=0.0, mla=MLA))
    teacher = AutoModelForCausalLM.from_pretrained(write_model(tmp_path / "teacher", dropout=0.0))
    batch = PackedRows(write_data(tmp_path / "data"), "train", VOCAB).batch([0, 1, 2, 3])

    def on(device: str):
        model, settings = student.to(device), FinetuneConfig(loss=loss)
        model.zero_grad()
        of = loss_function(settings, None if loss == "ce" else teacher.to(device))
        total, number = of(model, {name: rows.to(device) for name, rows in batch.items()})
        total.backward()
        return total.item(), int(number), {name: p.grad.cpu().clone() for name, p in model.named_parameters()}

    (value, number, gradients), (gpu_value, gpu_number, gpu_gradients) = on("cpu"), on("cuda")
    assert gpu_number == number and gpu_value == pytest.approx(value, rel=1e-4)
    for name, gradient in gradients.items():
        assert relative(gpu_gradients[name], gradient) < 1e-3, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("static", [False, True])
def test_decoding_equals_the_full_forward(dtype, static):
    model, ids = convert(tiny_model().cuda(), MLA)[0].to(dtype), tokens(2, 24).cuda()
    cache = StaticCache(config=model.config, max_cache_len=32) if static else DynamicCache(config=model.config)
    with torch.no_grad():
        expected = model(ids).logits
        model(ids[:, :20], past_key_values=cache)
        got = torch.cat([model(ids[:, n : n + 1], past_key_values=cache).logits for n in range(20, 24)], dim=1)
        other = model(ids.roll(1, 0)).logits
    error = relative(got.float(), expected[:, 20:].float())
    assert error < (1e-4 if dtype is torch.float32 else 3e-2) < relative(other.float(), expected.float())


@pytest.mark.parametrize("compiled", [False, True])
def test_fine_tuning_is_that_of_the_cpu(compiled, tmp_path):
    write_model(tmp_path / "model", dropout=0.0, mla=MLA)
    write_data(tmp_path / "data")

    def losses(device: Device, compiled: bool = False) -> torch.Tensor:
        config = FinetuneConfig(
            learning_rate=3e-3,
            global_batch_size=4,
            micro_batch_size=2,
            mixed_precision=Precision.no,
            torch_compile=compiled,
            log_every=1,
        )
        output = tmp_path / f"{device.value}"
        output.mkdir(exist_ok=True)
        found = finetune(
            tmp_path / "model", tmp_path / "data", output, config, start(config, LaunchConfig(device=device))
        )
        assert found["device"] == device.value
        rows = json.loads((output / "history.json").read_text())["train"]
        return torch.tensor([row["loss"] for row in rows])

    gpu = losses(Device.cuda, compiled)
    reset_accelerate()
    cpu = losses(Device.cpu)
    assert torch.allclose(gpu, cpu, rtol=2e-3) and gpu[-1] < gpu[0]


def reset_accelerate() -> None:
    """Accelerate keeps one device for a process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(autouse=True)
def fresh_accelerate():
    reset_accelerate()
    yield
    reset_accelerate()
