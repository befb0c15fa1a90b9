"""Text that a user gives is taken as it is, by Hydra, OmegaConf, make, the shell, a picture and a model card."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize
from omegaconf import OmegaConf

from conf.schema import Config, ModelConfig, typed_config
from conf.words import escaped, word

ROOT = Path(__file__).parents[2]
SHOW = "import json, sys; print(json.dumps(sys.argv[1:]))"
TEXTS = [
    "org/name",
    "/models/a b",
    "/models/a=b,c",
    "/models/[x]{y}(z)",
    "/models/${oc.env:HOME}/x",
    "/models/\\${x}",
    "/models/x\\\\${y}\\",
    "it's",
    'a"b',
    "a\\",
    "a\\'b",
    "/日本/ü",
    "$HOME",
    "a#b",
    "null",
    "true",
    "1e5",
    "a:b",
    "x${",
    "'",
    "?x*",
    "a\\'${b}'",
    "%s {0} {{ x }} [bold]",
]


@pytest.mark.parametrize("text", TEXTS)
def test_hydra_and_omegaconf_take_any_text_as_it_is(text: str) -> None:
    with initialize(config_path="../../conf", version_base="1.3"):
        config = compose("config", ["model=from_path", word("model.path", text), "model.name=m"])
    assert typed_config(config).model.path == text
    kept = {"model": {"path": text, "name": "m"}}
    merged = OmegaConf.merge(OmegaConf.structured(Config), escaped(kept))
    assert OmegaConf.to_container(merged.model, resolve=True)["path"] == text


def test_words_of_a_command_line_are_passed_on_as_they_were_given(tmp_path: Path) -> None:
    """Every stage of the pipeline composes them again."""
    code = (
        "import hydra, json, conf.schema; from conf.words import task_words\n"
        f"@hydra.main(config_path='{ROOT / 'conf'}', config_name='config', version_base='1.3')\n"
        "def main(cfg): print(json.dumps([cfg.model.path, task_words()]))\n"
        "main()"
    )
    words = ["model=from_path", word("model.path", "/a ${oc.env:HOME}/it's")]
    (tmp_path / "main.py").write_text(code)
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "main.py"), *words]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert json.loads(ran.stdout) == ["/a ${oc.env:HOME}/it's", words]


@pytest.mark.parametrize("text", ["/models/a b", "~/it's", "/m/a=b,$(date)${x}[y]`id`;#&"])
def test_make_takes_any_path(text: str) -> None:
    """As far as the words of the command; what Hydra makes of them is shown above."""
    outside = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of `make test`
    printed = subprocess.run(
        ["make", "-n", "-o", ".venv/.installed", "convert", f"MODEL={text}", f"RUN={sys.executable} -m"],
        cwd=ROOT,
        env=outside,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    command = printed.replace("-m train.convert", f"-c '{SHOW}'")
    ran = subprocess.run(["sh", "-c", command], cwd=ROOT, capture_output=True, text=True, check=True)
    words = json.loads(ran.stdout)
    assert words == ["model=from_path", word("model.path", text), "data=smollm"]


def test_a_home_is_found_in_every_place(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = Config(model=ModelConfig(path="~/my model/"), output_dir="~/out")
    assert config.model.path == f"{tmp_path}/my model" and config.model.name == "my model"
    assert config.output_dir == f"{tmp_path}/out"
    with pytest.raises(ValueError, match=r"model\.path=~nobody-of-that-name/x: "):
        ModelConfig(path="~nobody-of-that-name/x")


@pytest.mark.parametrize("name", ["..", ".", " ", "a/b", "../x", "a\nb", "x" * 300, "original", "data-x"])
def test_a_name_that_would_write_elsewhere_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="^name=") as refused:
        Config(model=ModelConfig(path="org/name"), name=name)
    assert "\n" not in str(refused.value)
    if name not in ("original", "data-x"):
        with pytest.raises(ValueError, match=r"^model\.name="):
            ModelConfig(path="org/name", name=name)


def test_the_working_folder_as_a_model_has_its_own_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert ModelConfig(path=".").name == tmp_path.name and ModelConfig(path="..").name == tmp_path.parent.name
    with pytest.raises(ValueError, match=r"model\.path is empty"):
        ModelConfig(path=" ")


def test_a_name_is_no_formula_in_a_picture(tmp_path: Path) -> None:
    from eval.picture import quiet_pyplot, save

    figure, axes = quiet_pyplot().subplots()
    figure.suptitle("a$b_{$ model")  # no formula: matplotlib would refuse it
    axes.plot([1, 10], [1, 100], label="$x^$")
    axes.set_yscale("log")
    axes.legend()
    save(figure, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")
