"""Stage `evaluate`: score the original, the converted and the healed model on the same inputs.

    python -m eval.evaluate experiment=laptop

The original's scores are a stage of their own, made once for all points of a sweep. One model is in memory
at a time. Both stages end in a `scores.json`; a killed run goes on where it stopped (eval/score.py).
"""

import json
from collections.abc import Iterable

import hydra
from omegaconf import DictConfig

from conf.devices import pick_device
from conf.errors import stage_main
from conf.models import local_model
from conf.plan import Plan
from conf.pretrained import load_config
from conf.schema import Config
from conf.stage import Stage, write_json
from eval.generate import ROPE_BITS
from eval.inputs import Inputs, prepare
from eval.results import CODED, mean_score
from eval.score import score_model
from mha2mla import QuantizedLatentCache


def run_evaluate(config: Config) -> None:
    """Finish the stages `original` and `evaluate` of one configuration."""
    plan = Plan(config)
    if not config.force and plan.original.record() and plan.evaluate.record():
        plan.original.skip()
        plan.evaluate.skip()
        return
    for stage in (plan.sample, plan.convert, plan.finetune):
        stage.require_finished()
    for bits in config.eval.cache_bits:  # refused before anything is scored
        QuantizedLatentCache(load_config(plan.finetune.folder), bits, ROPE_BITS)
    device, model = pick_device(config.launch.device), local_model(config)
    print("evaluate: preparing prompts and texts", flush=True)
    inputs = prepare(config, model, plan.sample.folder, device)
    describe(inputs, device)
    check_kept(plan, config, str(inputs.dtype).removeprefix("torch."))
    if config.force or not plan.original.record():
        score_stage(plan.original, {"original": model}, config.model.revision, inputs, config, device)
    if config.force or not plan.evaluate.record():
        healed = {"converted": str(plan.convert.folder), "healed": str(plan.finetune.folder)}
        score_stage(plan.evaluate, healed, None, inputs, config, device, config.eval.cache_bits)


def check_kept(plan: Plan, config: Config, dtype: str) -> None:
    """ValueError if scores that will be kept were made in another dtype, on another machine as a rule."""
    for stage in () if config.force else (plan.original, plan.evaluate):
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
    stage: Stage,
    models: dict[str, str],
    revision: str | None,
    inputs: Inputs,
    config: Config,
    device: str,
    cache_bits: Iterable[int] = (),
) -> None:
    """Score each of `models` (name → path), and the last of them with its cache in few bits; seal the stage."""
    variants: list[tuple[str, str, int | None]] = [(name, path, None) for name, path in models.items()]
    variants += [(CODED.format(name, bits), path, bits) for name, path, _ in variants[-1:] for bits in cache_bits]
    size = config.eval.batch_size
    with stage.run(resumable=True, force=config.force):
        scores = {
            name: score_model(name, path, revision, inputs, stage.folder / name, size, device, bits)
            for name, path, bits in variants
        }
        write_json(stage.folder / "scores.json", scores)
        for name, found in scores.items():
            stage.metrics[name] = {
                "score": mean_score(found["tasks"]),
                "perplexity": {text: each["value"] for text, each in found["perplexity"].items()},
            }


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
