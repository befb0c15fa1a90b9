"""`python -m train.export`: a checkpoint, a card and a measurement, made once; a refusal leaves nothing behind."""

import json
from pathlib import Path

import pytest
import yaml
from transformers import AutoTokenizer, DeepseekV3ForCausalLM

from mha2mla import ConversionOptions
from tests.eval.tiny import compose_config, finish_before_evaluation, write_original
from tests.tiny import preset
from train import export

NATIVE = ConversionOptions(**preset("native"), rope_dim=4, kv_lora_rank=6)


def test_export_is_written_with_a_card_and_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    write_original(tmp_path)
    config = compose_config(tmp_path, "method=native", "mla.rope_dim=4", "mla.kv_lora_rank=6")
    plan = finish_before_evaluation(config, NATIVE)
    export.run_export(config)
    folder = plan.run_dir / "export-native"
    found = json.loads((folder / "export.json").read_text())
    assert found["logits_error"] < 1e-4 and found["same_greedy_tokens"] and found["dtype"] == "float32"
    assert found["cache_numbers_per_token"] == 2 * (4 + 6)
    assert type(DeepseekV3ForCausalLM.from_pretrained(folder)).__name__ == "DeepseekV3ForCausalLM"
    assert AutoTokenizer.from_pretrained(folder).eos_token == "</s>"
    head, body = (folder / "README.md").read_text().split("---\n")[1:]
    assert yaml.safe_load(head)["base_model"] == config.model.path
    assert yaml.safe_load(body.split("```yaml\n")[1].split("```")[0])["mla"]["partial_rope"] == "evenly-spaced"
    assert "| score, 0-100 |" not in body  # nothing was scored, so nothing is said
    capsys.readouterr()
    export.run_export(config)
    assert "skipped" in capsys.readouterr().out


def test_a_model_that_a_form_cannot_say_leaves_no_folder(tmp_path: Path) -> None:
    write_original(tmp_path)
    config = compose_config(tmp_path)
    plan = finish_before_evaluation(config)
    with pytest.raises(ValueError, match="no native export of this llama_mla model: it has a rotated key for every"):
        export.run_export(config)
    assert not (plan.run_dir / "export-native").exists()


def test_an_export_that_is_another_function_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a wrong factor anywhere is noticed on what was written."""
    write_original(tmp_path)
    config = compose_config(tmp_path, "method=native", "mla.rope_dim=4", "mla.kv_lora_rank=6")
    plan = finish_before_evaluation(config, NATIVE)
    monkeypatch.setattr("mha2mla.native.SHRINK", 1.0)
    with pytest.raises(ValueError, match="the export's logits are off by"):
        export.run_export(config)
    assert not plan.export.record() and not (plan.run_dir / "export-native" / "export.json").exists()


def test_an_unfinished_run_is_not_exported(tmp_path: Path) -> None:
    write_original(tmp_path)
    with pytest.raises(FileNotFoundError, match="stage 'finetune' .* has not finished; run `make finetune`"):
        export.run_export(compose_config(tmp_path))
