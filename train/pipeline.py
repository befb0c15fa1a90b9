"""The whole way: convert, sample, fine-tune, evaluate, report. Finished stages are skipped.

    python -m train.pipeline model=from_path model.path=org/name
    python -m train.pipeline --multirun mla.kv_lora_rank=96,48,24

Every stage runs in a process of its own, so memory is free again after each; this one only decides what to run and
never loads torch unless it starts a training. A sweep runs one point after another: a point that fails is written
down (`point.json`) and the others go on; conf/sweep.py makes the table and the picture at the end.
"""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from conf.errors import StageError, said_to_user, stage_main
from conf.plan import Plan
from conf.schema import Config, typed_config
from conf.stage import Stage, write_json
from conf.words import task_words

MODULES = {
    "converse": "data.converse",
    "convert": "train.convert",
    "sample": "data.sample",
    "finetune": "train.finetune",
    "original": "eval.evaluate",
    "baselines": "eval.evaluate",
    "evaluate": "eval.evaluate",
    "report": "eval.report",
}


def run_point(config: Config, overrides: list[str]) -> None:
    """All stages of one configuration; `overrides` are the words that made it. StageError if one fails.

    Of several machines the first does everything; the others only take part in the training (`help_train`).
    """
    plan = Plan(config)
    if config.launch.machine_rank:
        help_train(config, plan, overrides)
        return
    started: set[str] = set()
    for stage in plan.stages:
        module = MODULES[stage.name.split("/")[0]]
        if module in started:  # eval.evaluate serves several stages; it is started once
            continue
        with stage.alone():
            if not stage.skip(config.force):
                started.add(module)
                run_stage(stage, config, module, overrides)
    report = plan.report.folder / "report.html"
    print(f"\nresult:  {plan.finetune.folder}\nreport:  {report}", flush=True)


def help_train(config: Config, plan: Plan, overrides: list[str]) -> None:
    """What the machines beside the first do, in the folder that all of them share: wait for what the first one makes,
    and join its training."""
    for stage in (plan.convert, plan.sample):
        wait_for(stage)
    if not plan.finetune.skip(config.force):
        run_stage(plan.finetune, config, MODULES["finetune"], overrides)


def wait_for(stage: Stage, seconds: float = 5.0) -> None:
    if stage.record() is None:
        print(f"waiting for machine 0 to finish '{stage.name}' in {stage.folder}, which all machines share", flush=True)
    while stage.record() is None:
        time.sleep(seconds)


def run_stage(stage: Stage, config: Config, module: str, overrides: list[str]) -> None:
    command = [sys.executable, "-m", module, *overrides]
    environment: dict[str, str] = {}
    if stage.name == "finetune":
        from train.launch import launch_command

        command, environment = launch_command(config.launch, module, overrides)
    print(f"\n== {stage.name} ==", flush=True)
    finished = subprocess.run(command, env=os.environ | environment, check=False)
    if finished.returncode:
        raise StageError(f"stage '{stage.name}' failed with exit code {finished.returncode}")
    if config.launch.machine_rank:
        wait_for(stage)
    if stage.record() is None:
        raise StageError(f"stage '{stage.name}' ended without a finished record in {stage.folder}")


def run_sweep_point(cfg: DictConfig, overrides: list[str], folder: Path) -> None:
    """One point of a sweep: its outcome is on disk whatever happens to it."""
    point: dict[str, Any] = {"overrides": overrides, "status": "unfinished"}
    write_json(folder / "point.json", point)
    print(f"\n==== {' '.join(overrides)} ====", flush=True)
    try:
        config = typed_config(cfg)
        point["name"] = config.name
        point["run_dir"] = str(Plan(config).run_dir)
        run_point(config, overrides)
        point["status"] = "finished"
    except Exception as error:
        if not (said := said_to_user(error)):
            raise
        print(f"error: {said}", file=sys.stderr, flush=True)
        point |= {"status": "failed", "error": said}
    write_json(folder / "point.json", point)


@hydra.main(version_base="1.3", config_path="../conf", config_name="config")
def main(cfg: DictConfig) -> None:
    job = HydraConfig.get()
    overrides = task_words()
    if job.mode is RunMode.MULTIRUN:
        run_sweep_point(cfg, overrides, Path(job.runtime.output_dir))
    else:
        stage_main(lambda config: run_point(config, overrides))(cfg)


if __name__ == "__main__":
    main()
