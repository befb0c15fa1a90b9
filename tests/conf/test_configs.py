"""Every shipped YAML composes and is valid; a typo anywhere is an error that names the key."""

from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException, HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from conf.schema import Config, typed_config

CONF = Path(__file__).parents[2] / "conf"
GROUPS = sorted(path.relative_to(CONF) for path in CONF.glob("*/**/*.yaml"))
NEEDED = {"from_path": ["model.path=org/name"], "local": ["data.files=[x]"]}  # by files that leave something open


def composed(*overrides: str) -> Config:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return typed_config(compose("config", overrides=[*overrides]))


def test_the_glob_finds_the_groups() -> None:
    assert len(GROUPS) >= 12
    assert {path.parts[0] for path in GROUPS} >= {"model", "method", "data", "finetune", "eval", "launch", "experiment"}
    assert NEEDED.keys() <= {path.stem for path in GROUPS}


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_every_group_file_composes(path: Path) -> None:
    group, name = str(path.parent), path.stem
    config = composed(f"{group}={name}", *NEEDED.get(name, []))
    assert config.model.name
    # Not only composed but taken over: every scalar of the file stands in the result.
    written = OmegaConf.load(CONF / path)
    first_line = (CONF / path).read_text().splitlines()[0]
    node = config if "_global_" in first_line else getattr(config, "mla" if group == "method" else group)
    for key, value in OmegaConf.to_container(written).items():  # type: ignore[union-attr]
        if isinstance(value, (int, float, str)) and value != "???":
            got = getattr(node, str(key))
            assert getattr(got, "value", got) == value or float(got) == float(value)


@pytest.mark.parametrize("path", GROUPS, ids=str)
def test_a_typo_in_any_group_file_is_an_error(path: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(CONF, tmp_path / "conf", ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    file = tmp_path / "conf" / path
    file.write_text(file.read_text() + "\nlearning_rat: 1\n")
    with (
        initialize_config_dir(str(tmp_path / "conf"), version_base="1.3"),
        pytest.raises((OmegaConfBaseException, HydraException), match="learning_rat"),
    ):
        compose("config", overrides=[f"{path.parent}={path.stem}"])


def test_a_typo_on_the_command_line_is_an_error() -> None:
    with pytest.raises((ConfigCompositionException, OmegaConfBaseException), match="kv_lora_rnk"):
        composed("mla.kv_lora_rnk=3")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.fraction=0", r"data.fraction=0.0 must lie in \(0, 1\]"),
        ("data.fraction=1.5", r"data.fraction=1.5 must lie in \(0, 1\]"),
        ("data.tokens=-5", "data.tokens=-5 must be positive"),
        ("finetune.micro_batch_size=3", "finetune.global_batch_size=64 must be a multiple"),
        ("finetune.decay_fraction=0.99", "warmup_fraction"),
        ("data.sources.prose.weight=0", "data.sources.prose.weight=0"),
    ],
)
def test_cross_field_checks_name_the_key(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        composed(override)


@pytest.mark.parametrize(
    ("loss", "override", "needed"),
    [
        ("ce", "finetune.teacher=org/name", "kd or kd.hidden"),
        ("ce", "finetune.kd_temperature=2", "kd or kd.hidden"),
        ("kd", "finetune.hidden_weight=0.5", "kd.hidden"),
    ],
)
def test_settings_of_another_loss_are_errors(loss: str, override: str, needed: str) -> None:
    with pytest.raises(ValueError, match=f"{override}.* has no effect with finetune.loss={loss}; use {needed}$"):
        composed(f"finetune.loss={loss}", override)
    composed("finetune.loss=kd+hidden", override)
    key = override.split("=")[0]
    if "teacher" not in key:
        composed(f"finetune.loss={loss}", f"{key}=1.0")
        with pytest.raises(ValueError, match=f"{key}=0.0 must be positive"):
            composed("finetune.loss=kd+hidden", f"{key}=0")


def test_paper_defaults() -> None:
    config = composed("method=mha2mla")
    assert (config.mla.partial_rope, config.mla.low_rank, config.mla.reconstruction_steps) == ("high", "joint", 0)
    assert composed().mla == composed("method=best").mla
    assert config.finetune.learning_rate == 1e-4 and config.finetune.global_batch_size == 64
    assert config.data.fraction == 0.003


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ([], "best-cut0.875"),
        (["method=mha2mla", "mla.rope_dim=24", "mla.kv_lora_rank=48"], "mha2mla-R24-r48"),
        (["mla.bits=16"], "best+bits-16-cut0.6875"),
        (["mla.value_weight=0.5", "mla.reduction=0.75"], "best+value_weight-0.5-cut0.75"),
        (["method=mha2mla", "mla.partial_rope=low", "mla.q_lora_rank=7"], "mha2mla+partial_rope-low-q7-cut0.6875"),
    ],
)
def test_names_of_points_tell_them_apart(words: list[str], name: str) -> None:
    assert composed(*words).name == name
    assert composed(*words, "name=mine").name == "mine"


def test_no_clock_in_paths_of_single_runs() -> None:
    """Ranks of one launch must agree on every path: `${now:}` may stand in the sweep's folder only."""
    for path in CONF.rglob("*.yaml"):
        for line in path.read_text().splitlines():
            assert "${now:" not in line or "sweeps/" in line, f"{path}: {line}"
