"""SIGKILL at many moments of every stage: started again it ends as a run that nobody touched, with nothing left behind.

KILLS=20 of every stage, on tiny models (`make test-slow`). The processes are forked from one that holds torch already,
so that the moments are the stage's own and not those of its imports. Every second kill meets the stage's process
alone: what it started has to end by itself.
"""

import importlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import pytest

from conf.plan import Plan
from conf.schema import Config
from conf.stage import read_record
from tests.train.test_pipeline import command_line
from tests.train.tiny import composed

pytestmark = pytest.mark.slow
KILLS = int(os.environ.get("KILLS", "20"))
FORKS = get_context("forkserver")
PATIENCE = 120  # seconds, for what should end soon

# What no two runs have in common.
TIMES = {
    *("seconds", "finished", "provenance", "date", "stages", "train_seconds", "tokens_per_second", "peak_memory_gib"),
}


@dataclass
class Case:
    """A stage, what it is told beside the common words, and those that come before it."""

    module: str
    words: tuple[str, ...] = ()
    before: tuple[str, ...] = ()


OWN = "+data.sources={{text:{{data_files:[{corpus}]}},own:{{kind:generated}}}}"
CHAIN = ("train.convert", "data.sample", "train.finetune", "eval.evaluate", "eval.report")
CASES = {
    "converse": Case("data.converse", (OWN, "data.files=[]", "data.tokens=20000")),
    "convert": Case("train.convert"),
    "streamed": Case("train.convert", ("launch.streamed=on", "mla.bits=16", "mla.reconstruction_steps=20")),
    "sample": Case("data.sample", ("data.num_workers=2", "data.tokens=20000")),
    "finetune": Case("train.finetune", ("finetune.save_every=3", "finetune.max_steps=16"), CHAIN[:2]),
    "distil": Case("train.finetune", ("finetune.loss=kd", "finetune.teacher_top_k=8"), CHAIN[:2]),
    "evaluate": Case("eval.evaluate", ("eval.cache_bits=[8]",), CHAIN[:3]),
    "report": Case("eval.report", (), CHAIN[:4]),
    "export": Case("train.export", ("export.form=vllm",), CHAIN[:3]),
}


def stage_process(module: str, words: list[str], log: str) -> None:
    """What `python -m module words` does, in a group of its own."""
    os.setsid()
    stream = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.argv = [module, *words]
    importlib.import_module(module).main()


class Project:
    """One folder: a model, a corpus, and the command line of a stage over them."""

    def __init__(self, root: Path, case: Case):
        self.root, self.case = root, case
        own = [word.format(corpus=root / "corpus.jsonl") for word in case.words]
        named = {word.split("=")[0].lstrip("+") for word in own}
        common = [word for word in command_line(root) if word.split("=")[0] not in named]
        words = [*common, "mla.kv_lora_rank=8", "tracking=none", "name=point", *own]
        self.words = [word for word in words if word != "data.files=[]"]
        self.log = root / "log.txt"

    def words_in(self, outputs: str) -> list[str]:
        return [word for word in self.words if not word.startswith("output_dir=")] + [
            f"output_dir={self.root / outputs}"
        ]

    def config(self, outputs: str) -> Config:
        return composed(self.words_in(outputs))

    def folders(self, outputs: str) -> list[Path]:
        """Of the stages that the module makes."""
        plan, name = Plan(self.config(outputs)), self.case.module.split(".")[1]
        stages = [plan.original, plan.evaluate] if name == "evaluate" else [getattr(plan, name)]
        return [stage.folder for stage in stages]

    def start(self, outputs: str, module: str | None = None) -> BaseProcess:
        """The stage's process, once it has said something."""
        self.log.unlink(missing_ok=True)
        arguments = (module or self.case.module, self.words_in(outputs), str(self.log))
        process = FORKS.Process(target=stage_process, args=arguments)
        process.start()
        while process.is_alive() and not (self.log.exists() and self.log.stat().st_size):
            time.sleep(0.005)
        return process

    def run(self, outputs: str, module: str | None = None) -> float:
        """To its end; the seconds since its first word."""
        process, began = self.start(outputs, module), time.monotonic()
        process.join(PATIENCE)
        assert process.exitcode == 0, self.log.read_text()[-3000:]
        return time.monotonic() - began

    def kill(self, process: BaseProcess, alone: bool) -> None:
        assert process.pid
        try:
            family = psutil.Process(process.pid).children(recursive=True)
            os.kill(process.pid, signal.SIGKILL) if alone else os.killpg(process.pid, signal.SIGKILL)
        except (psutil.NoSuchProcess, ProcessLookupError):  # it has just ended
            family = []
        process.join()
        left = psutil.wait_procs(family, timeout=PATIENCE)[1]
        assert not left, f"{left} outlived the stage that started them"


def common(value: Any) -> Any:
    """JSON without what no two runs have in common."""
    if isinstance(value, dict):
        return {name: common(item) for name, item in value.items() if name not in TIMES}
    return [common(item) for item in value] if isinstance(value, list) else value


def content(file: Path, outputs: Path) -> Any:
    """What two runs must have in common of a file."""
    data = file.read_bytes()
    if file.suffix in (".md", ".html"):
        text = data.decode().replace(str(outputs), "")
        return re.sub(r"\d{4}-\d\d-\d\dT[\d:]+Z|base64,[\w+/=]+|\d+ s\b|[\d.,]+ tokens/s", "", text)
    if file.suffix in (".json", ".jsonl"):
        rows = data.decode().replace(str(outputs), "")
        return [common(json.loads(row)) for row in ([rows] if file.suffix == ".json" else rows.splitlines())]
    return data


def tree(outputs: Path) -> dict[str, Any]:
    """All files of an output folder with their contents, but for the cache that `datasets` keeps beside the shards."""
    files = sorted(file for file in outputs.rglob("*") if file.is_file() and "cache" not in file.parts)
    return {str(file.relative_to(outputs)): content(file, outputs) for file in files}


def assert_same(project: Project, expected: dict[str, Any]) -> None:
    found = tree(project.root / "killed")
    assert found.keys() == expected.keys()
    assert not [name for name in expected if found[name] != expected[name]]


@pytest.fixture(scope="module", autouse=True)
def forks() -> None:
    """The server that stages are forked from, with everything imported."""
    os.environ.update(HF_HUB_OFFLINE="1", WANDB_MODE="offline")
    FORKS.set_forkserver_preload([case.module for case in CASES.values()])


@pytest.mark.parametrize("name", CASES)
def test_a_stage_that_is_killed_again_and_again_ends_like_one_that_is_not(name: str, tmp_path: Path) -> None:
    case, chance, kills = CASES[name], random.Random(name), 0
    project = Project(tmp_path, case)
    for module in case.before:
        project.run("ready", module)
    (tmp_path / "ready").mkdir(exist_ok=True)
    shutil.copytree(tmp_path / "ready", tmp_path / "whole")
    seconds = project.run("whole")
    expected = tree(tmp_path / "whole")
    assert all(read_record(folder) for folder in project.folders("whole"))
    shutil.copytree(tmp_path / "ready", tmp_path / "killed")
    ends = 0
    while kills < KILLS:
        process = project.start("killed")
        # A third of the moments lie where the results are written and sealed.
        process.join(seconds * (chance.uniform(0.8, 1.1) if kills % 3 == 2 else chance.uniform(0, 1)))
        if process.is_alive():
            project.kill(process, alone=kills % 2 == 1)
            kills += 1
        else:
            assert process.exitcode == 0, project.log.read_text()[-3000:]
        if all(read_record(folder) for folder in project.folders("killed")):
            project.run("killed")  # finished: nothing is done anew but what the end of a run clears away
            assert_same(project, expected)
            shutil.rmtree(tmp_path / "killed")
            shutil.copytree(tmp_path / "ready", tmp_path / "killed")
            ends += 1
    project.run("killed")
    assert_same(project, expected)
    print(f"{name}: {seconds:.1f} s undisturbed, {kills} kills, {ends + 1} ends")
