"""The README says what the results say, and its commands exist."""

import re
import runpy
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TABLES = runpy.run_path(str(ROOT / "docs" / "make_tables.py"))


@pytest.mark.parametrize("document", TABLES["DOCUMENTS"])
def test_tables_are_those_of_the_results(document: str) -> None:
    text = (ROOT / document).read_text()
    assert TABLES["filled"](text, document) == text, "run `python docs/make_tables.py`"


def test_a_changed_figure_is_noticed() -> None:
    text = (ROOT / "README.md").read_text()
    figure = re.search(r"\| original \| ([\d,]+) \|", text)
    assert figure
    assert TABLES["filled"](text.replace(figure[0], "| original | 1 |")) == text


def test_a_missing_block_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no block"):
        TABLES["filled"]("nothing here")


def test_make_targets_of_the_readme_exist() -> None:
    text = (ROOT / "README.md").read_text()
    targets = set(re.findall(r"^make ([a-z-]+)", text, re.MULTILINE)) | {"bench", "test-slow", "report", "export"}
    assert {"finetune", "sweep", "convert"} <= targets
    for target in targets:
        run = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True, check=False)
        assert run.returncode == 0, run.stderr


def test_a_model_of_ones_own_heals_on_the_papers_mixture_unless_told_otherwise() -> None:
    """What the environment carries is far less than 0.3 % of any pretraining."""

    def words(*arguments: str) -> list[str]:
        command = ["make", "-n", "finetune", *arguments]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()

    assert "data=smollm" in words("MODEL=org/name")
    assert "data=smollm" in words("MODEL=org/name", "ARGS=data.tokens=5 mla.reduction=0.5")
    assert "data=smollm" not in words("MODEL=org/name", "ARGS=mla.reduction=0.5 data=local")
    assert "data=smollm" not in words() and "experiment=laptop" in words()


def test_results_carry_their_provenance() -> None:
    import json

    files = sorted((ROOT / "docs" / "results").glob("*.json"))
    assert len(files) >= 3
    for file in files:
        found = json.loads(file.read_text())
        if file.stem == "published":  # others' figures have a source instead
            assert "arXiv" in found["source"]
            continue
        provenance = found["provenance"]
        assert provenance["commit"] and provenance["hardware"] and provenance["versions"], file
