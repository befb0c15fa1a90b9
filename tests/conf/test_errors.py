"""How a stage ends: one line for what a user can mend, a traceback for a mistake of ours."""

from pathlib import Path

import pyarrow as pa
import pytest
from jinja2 import TemplateError
from omegaconf.errors import MissingMandatoryValue
from safetensors import SafetensorError, safe_open

from conf.errors import LONGEST, ends_in_one_line, one_line


def ends(error: Exception) -> int | str | None:
    with pytest.raises(SystemExit) as ended, ends_in_one_line():
        raise error
    return ended.value.code


@pytest.mark.parametrize(
    "error",
    [
        ValueError("first\n   second"),
        OSError(28, "No space left on device"),
        SafetensorError("header too small"),
        pa.ArrowNotImplementedError("no such codec"),
        TemplateError("unexpected end"),
        MissingMandatoryValue("Structured config of type `ModelConfig` has missing mandatory value: path"),
        MemoryError(),
        OSError(),
    ],
)
def test_what_a_user_can_mend_is_one_line(
    error: Exception, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HYDRA_FULL_ERROR", raising=False)
    assert ends(error) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and len(said) > 12
    assert str(error).split("\n")[0] in said


@pytest.mark.parametrize("error", [KeyError("x"), RuntimeError("shapes"), AssertionError(), TypeError("x")])
def test_a_mistake_of_ours_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)), ends_in_one_line():
        raise error


def test_a_readers_own_error_is_known_by_its_library(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "x.safetensors").write_bytes(b"no header")
    with pytest.raises(SystemExit), ends_in_one_line():
        safe_open(tmp_path / "x.safetensors", "pt")
    assert capsys.readouterr().err.count("\n") == 1


def test_pages_of_a_library_are_cut_to_a_part_of_a_line() -> None:
    said = one_line(ValueError("a  b\n\tc " + "x" * 2000))
    assert said.startswith("a b c xxx") and len(said) == LONGEST
    assert one_line(ValueError()) == "ValueError"
