"""A healed model in a form that other programs load.

    python -m train.export experiment=laptop export.form=native     # DeepSeek-V3's layout: transformers and engines
    python -m train.export experiment=laptop export.form=vllm       # our classes, as vLLM's Transformers backend wants

Writes the checkpoint, a model card with configuration, cache and scores, and `export.json`: how far the logits of what
was written are from the model's own. What a form cannot say exactly is refused by name.
"""

import json
from pathlib import Path
from typing import Any

import hydra
import torch
import transformers
import yaml
from omegaconf import DictConfig
from transformers import DeepseekV3ForCausalLM

from conf.checkpoint import load_model
from conf.errors import stage_main
from conf.plan import Plan, plain
from conf.precision import torch_dtype
from conf.pretrained import load_tokenizer
from conf.schema import Config, ExportForm, ExportStage
from conf.stage import write_json
from mha2mla.bits import clear_format
from mha2mla.modeling.cache_format_mla import mean_bits
from mha2mla.native import to_deepseek
from mha2mla.served import to_served
from train.checkpoint import appearing_in

ALLOWED = {torch.float32: 1e-4, torch.bfloat16: 0.1}  # relative error of the logits, by dtype


def export_model(config: Config, plan: Plan, folder: Path) -> dict[str, Any]:
    """Write the export into `folder`; returns what was measured on the checkpoint, read back from there."""
    stage = plan.finetune if config.export.stage is ExportStage.finetune else plan.convert
    stage.require_finished()
    dtype = torch_dtype(config.export.dtype, True, stored="auto")
    print(f"export: loading {stage.folder}", flush=True)
    model = load_model(stage.folder, dtype).eval()
    bits = leave_format(model)
    exported = to_deepseek(model) if config.export.form is ExportForm.native else to_served(model)
    tokenizer = load_tokenizer(stage.folder)
    with appearing_in(folder) as whole:
        exported.save_pretrained(whole)
        tokenizer.save_pretrained(whole)
        del exported
        print("export: comparing what was written with the model", flush=True)
        found = compare(model, whole, config.export.form)
        found["cache_numbers_per_token"] = model.config.num_hidden_layers * (
            model.config.kv_lora_rank + model.config.rope_dim
        )
        found["cache_bits_left_out"] = bits
        (whole / "README.md").write_text(model_card(config, plan, found))
        write_json(whole / "export.json", found)
    return found


def leave_format(model: Any) -> float | None:
    """Take a model's cache format away, which no engine's layout can say; returns its bits a token a layer, if any."""
    if model.config.cache_format is None:
        return None
    mean, numbers = mean_bits(model.config), model.config.kv_lora_rank + model.config.rope_dim
    clear_format(model)
    print(
        f"export: the cache format ({mean:.0f} bits a token a layer) is not carried over: engines keep all {numbers} "
        "numbers of latent and rotated key in bits of their own; for a small cache there convert with mla.bits=16",
        flush=True,
    )
    return mean


@torch.no_grad()
def compare(model: Any, folder: Path, form: ExportForm) -> dict[str, Any]:
    """Relative error of the logits of 64 tokens, and whether 16 greedy tokens after them are the same; ValueError if
    the export is not the same function."""
    if form is ExportForm.native:
        other: Any = load_model(folder, model.dtype, model_class=DeepseekV3ForCausalLM)
    else:
        other = load_model(folder, model.dtype)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, 64), generator=generator)
    expected, got = model(ids).logits.float(), other(ids).logits.float()
    error = float((got - expected).norm() / expected.norm())
    if not error < ALLOWED[model.dtype]:
        raise ValueError(f"the export's logits are off by {error:.1e} (allowed {ALLOWED[model.dtype]}): not written")
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False}
    same = torch.equal(model.generate(ids, **options), other.generate(ids, **options))
    return {
        "form": form.value,
        "dtype": str(model.dtype).removeprefix("torch."),
        "logits_error": error,
        "same_greedy_tokens": same,
    }


CARD = """---
base_model: {base}
library_name: transformers
tags: [mla, multi-head-latent-attention, mha2mla]
---

# {name} with Multi-head Latent Attention

{source}, {made}. The cache holds {numbers} numbers a token{against}.

{scores}
Form: {form}. Logits of this checkpoint against the model it was made from: {error:.1e} relative in {dtype}.

Made with this configuration:

```yaml
{settings}```
"""


def model_card(config: Config, plan: Plan, found: dict[str, Any]) -> str:
    """README.md of the export; scores only where the run's report has them."""
    settings = {name: plain(getattr(config, name)) for name in ("model", "mla", "calibration", "data", "finetune")}
    report, scores, against = plan.report.folder / "results.json", "", ""
    conversion = plan.convert.folder / "conversion.json"
    if found["cache_bits_left_out"] is not None:
        bits = found["cache_bits_left_out"]
        against = f" in 16 bits (in transformers {bits:.0f} bits a token a layer, a format that engines do not have)"
    elif conversion.exists():
        against = f", {100 * json.loads(conversion.read_text())['reduction']:.2f} % less than the original's"
    if plan.report.record():
        results = json.loads(report.read_text())
        rows = [f"| {model} | {score:.1f} |" for model, score in results["score"].items() if score is not None]
        scores = "| model | score, 0-100 |\n| --- | ---: |\n" + "\n".join(rows) + "\n"
    return CARD.format(
        source=config.model.path,
        base=json.dumps(config.model.path),  # YAML takes it whatever stands in it
        made="converted" if config.export.stage is ExportStage.convert else "converted and healed",
        name=config.model.name,
        numbers=found["cache_numbers_per_token"],
        against=against,
        scores=scores,
        form=found["form"],
        error=found["logits_error"],
        dtype=found["dtype"],
        settings=yaml.safe_dump(settings, sort_keys=False),
    )


def run_export(config: Config) -> None:
    plan = Plan(config)
    stage = plan.export
    if stage.skip(config.force):
        return
    with stage.run(force=config.force):
        found = export_model(config, plan, stage.folder)
        stage.metrics |= found
    same = "same" if found["same_greedy_tokens"] else "not the same"
    print(
        f"export: {stage.folder}: logits off by {found['logits_error']:.1e} in {found['dtype']}, {same} greedy tokens"
    )


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    transformers.utils.logging.disable_progress_bar()
    stage_main(run_export)(cfg)


if __name__ == "__main__":
    main()
