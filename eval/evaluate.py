"""Stage `evaluate`: score the original, its baselines, the converted and the healed model on the same inputs.

    python -m eval.evaluate experiment=laptop

Scores of the original, and of it with each quantised cache (`eval.baselines`), are stages of their own, made once for
all points of a sweep. One model is in memory at a time, and the original beside it while texts are read. Every stage
ends in a `scores.json`; a killed run goes on where it stopped (eval/score.py).
"""

import json
from collections.abc import Iterable
from typing import Any

import hydra
from omegaconf import DictConfig

from conf.devices import pick_device
from conf.errors import stage_main
from conf.models import local_model
from conf.plan import Plan
from conf.pretrained import load_config
from conf.schema import Config
from conf.stage import Stage, write_json
from eval.baselines import baseline, check_baselines
from eval.generate import ROPE_BITS
from eval.inputs import Inputs, prepare
from eval.results import mean_score
from eval.score import score_model
from eval.variants import Variant, checkpoint, in_few_bits
from mha2mla import QuantizedLatentCache


def run_evaluate(config: Config) -> None:
    """Finish the stages `original`, `baselines/...` and `evaluate` of one configuration."""
    plan = Plan(config)
    stages = [plan.original, *plan.baselines.values(), plan.evaluate]
    if not config.force and all(stage.record() for stage in stages):
        for stage in stages:
            stage.skip()
        return
    for stage in (plan.sample, plan.convert, plan.finetune):
        stage.require_finished()
    for bits in config.eval.cache_bits:  # refused before anything is scored
        QuantizedLatentCache(load_config(plan.finetune.folder), bits, ROPE_BITS)
    device, path = pick_device(config.launch.device), local_model(config)
    check_baselines(plan.baselines, load_config(path, config.model.revision))
    print("evaluate: preparing prompts and texts", flush=True)
    inputs = prepare(config, path, plan.sample.folder, device)
    describe(inputs, device)
    check_kept(stages, config, str(inputs.dtype).removeprefix("torch."))
    original = checkpoint("original", path, inputs.dtype, device, config.model.revision, is_original=True)
    converted, healed = (
        checkpoint(name, str(stage.folder), inputs.dtype, device)
        for name, stage in (("converted", plan.convert), ("healed", plan.finetune))
    )
    score_stage(plan.original, [original], None, inputs, config, device)
    for name, stage in plan.baselines.items():
        score_stage(stage, [baseline(name, original, config, inputs.tokenizer)], original, inputs, config, device)
    few = in_few_bits(healed, config.eval.cache_bits)
    score_stage(plan.evaluate, [converted, healed, *few], original, inputs, config, device)


def check_kept(stages: Iterable[Stage], config: Config, dtype: str) -> None:
    """ValueError if scores that will be kept were made in another dtype, on another machine as a rule."""
    for stage in () if config.force else stages:
        if stage.record() is None:
            continue
        for name, scores in json.loads((stage.folder / "scores.json").read_text()).items():
            if scores["dtype"] != dtype:
                raise ValueError(
                    f"{stage.folder} holds scores of the {name} model in {scores['dtype']}, but "
                    f"eval.dtype={config.eval.dtype.value} is {dtype} on this machine, and scores in different dtypes "
                    f"do not compare; give eval.dtype={dtype}, which scores all models again, or run where "
                    f"{scores['dtype']} is native"
                )


def score_stage(
    stage: Stage, variants: list[Variant], original: Variant | None, inputs: Inputs, config: Config, device: str
) -> None:
    """Score each model, compare its texts with the original's, and seal the stage; nothing where that is done."""
    if stage.record() and not config.force:
        return
    size = config.eval.batch_size
    with stage.run(resumable=True, force=config.force):
        scores = {
            each.name: score_model(each, inputs, stage.folder / each.name, size, device, original) for each in variants
        }
        write_json(stage.folder / "scores.json", scores)
        for name, found in scores.items():
            stage.metrics[name] = {"score": mean_score(found["tasks"])} | text_metrics(found["perplexity"])


def text_metrics(texts: dict[str, Any]) -> dict[str, Any]:
    """Perplexity and, where it was measured, KL to the original by text."""
    kinds = {"perplexity": "value", "kl_divergence": "kl_divergence"}
    found = {kind: {text: each[key] for text, each in texts.items() if key in each} for kind, key in kinds.items()}
    return {kind: values for kind, values in found.items() if values}


def describe(inputs: Inputs, device: str) -> None:
    rows = sum(len(each.rows) for each in inputs.tasks)
    tokens = sum(each.tokens for each in inputs.tasks)
    cut = sum(prompt.truncated for each in inputs.tasks for prompt in each.prompts)
    print(f"evaluate: {len(inputs.tasks)} tasks, {rows} rows, {tokens} prompt tokens, {cut} prompts cut in the middle")
    for text in inputs.texts:
        print(f"evaluate: perplexity on {text.name}, {text.tokens} tokens")
    print(f"evaluate: prompts {'in' if inputs.chat else 'without'} the chat template")
    print(f"evaluate: models in {str(inputs.dtype).removeprefix('torch.')} on {device}", flush=True)


@hydra.main(config_path="../conf", config_name="config", version_base="1.3")
def main(cfg: DictConfig) -> None:
    stage_main(run_evaluate)(cfg)


if __name__ == "__main__":
    main()
