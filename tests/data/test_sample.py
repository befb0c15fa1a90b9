"""The stage as a whole, on tiny corpora: what is taken, how it is packed, what it does not depend on."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from datasets import load_dataset
from transformers import AutoTokenizer

from conf.plan import Plan, plain
from conf.schema import Config, DocumentEnd
from data.calibration import calibration_batches
from data.documents import Split
from data.sample import sample
from tests.data.corpora import WORDS, documents, local, make_config, write_jsonl

EOS = len(WORDS) + 1


def run(config: Config) -> dict[str, Any]:
    sample(config)
    return json.loads((Plan(config).sample.folder / "manifest.json").read_text())


def read_rows(config: Config, side: str) -> tuple[np.ndarray, np.ndarray]:
    """input_ids and position_ids `[rows, sequence_length]`, as the trainer loads them."""
    files = str(Plan(config).sample.folder / f"{side}-*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(Path(config.output_dir) / "cache"))
    rows.set_format("numpy")
    return np.stack(rows["input_ids"][:]), np.stack(rows["position_ids"][:])


def pieces(ids: np.ndarray, positions: np.ndarray) -> list[tuple[int, ...]]:
    """The stretches of one document each, cut where positions restart."""
    flat = ids.reshape(-1)
    starts = np.flatnonzero(positions.reshape(-1) == 0)
    return [tuple(stretch.tolist()) for stretch in np.split(flat, starts[1:])]


def encoded(config: Config, texts: list[str]) -> list[tuple[int, ...]]:
    rows = AutoTokenizer.from_pretrained(config.model.path)(texts)["input_ids"]
    return [(*row, EOS) for row in rows]


def lowest(config: Config, texts: list[str], wanted: int, side: str) -> set[int]:
    """The rule, written down once more: documents of a side by hash until there are `wanted` tokens."""
    split, tokens, chosen = Split.of(config), encoded(config, texts), set()
    for number in sorted(range(len(texts)), key=lambda n: split.key(texts[n])):
        if split.place(split.key(texts[number]))[0] == side and wanted > 0:
            chosen.add(number)
            wanted -= len(tokens[number])
    return chosen


def check_lowest(config: Config, texts: list[str]) -> None:
    """The shards hold exactly the documents that the rule names, all whole but one."""
    tokens = encoded(config, texts)
    for side, wanted in (("train", 6400), ("validation", 640)):
        ids, positions = read_rows(config, side)
        assert ids.shape == positions.shape == (wanted // 64, 64)
        packed = [tuple(d.tolist()) for d in np.split(ids.reshape(-1), np.flatnonzero(ids == EOS) + 1) if len(d)]
        chosen = {tokens[number] for number in lowest(config, texts, wanted, side)}
        assert len(packed) == len(chosen) == len(set(packed))
        cut = set(packed) - chosen
        assert len(cut) <= 1
        assert all(any(document[: len(c) - 1] == c[:-1] for document in chosen - set(packed)) for c in cut)
        assert all(EOS not in stretch[:-1] for stretch in pieces(ids, positions))


def test_rows_hold_exactly_the_documents_of_lowest_hash(tmp_path: Path) -> None:
    texts = documents(600)
    config = make_config(tmp_path, {"a": local(write_jsonl(tmp_path / "a.jsonl", texts))})
    manifest = run(config)
    check_lowest(config, texts)
    assert manifest["tokens"] == 6400 and manifest["documents"] == len(lowest(config, texts, 6400, "train"))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_the_same_where_the_text_first_seen_misleads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """Files begin with dense text and go on with 30 characters a token: what is read at first is far too little."""
    monkeypatch.setattr("data.sources.GROUP_BYTES", 1)  # each file a part with a limit of its own
    parts = []
    for n in range(6):
        texts = documents(164, seed=n)
        parts.append(texts[:64] + [text.replace(" ", " " * 28) for text in texts[64:]])
    files = [write_jsonl(tmp_path / f"{n}.jsonl", texts) for n, texts in enumerate(parts)]
    config = make_config(tmp_path, {"a": local(*files)}, num_workers=workers)
    run(config)
    check_lowest(config, sum(parts, []))


def test_sources_are_mixed_throughout(tmp_path: Path) -> None:
    """A tenth of a large source has only low hashes: its documents must not all come first, nor last."""
    large, small = [" ".join(["w1"] * 40 + [f"w{n % 200}", f"w{n // 200}"]) for n in range(3000)], documents(200)
    sources = {
        "large": local(write_jsonl(tmp_path / "large.jsonl", large)),
        "small": local(write_jsonl(tmp_path / "small.jsonl", small)),
    }
    config = make_config(tmp_path, sources, tokens=12_800)
    run(config)
    ids, _ = read_rows(config, "train")
    shares = [(quarter == 2).mean() for quarter in np.split(ids, 4)]  # w1 is token 2
    assert all(0.3 < share < 0.7 for share in shares), shares


def test_positions_restart_at_documents_and_rows(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"a": local(write_jsonl(tmp_path / "a.jsonl", documents(600, longest=300)))})
    run(config)
    ids, positions = read_rows(config, "train")
    after_eos = np.zeros_like(ids, dtype=bool)
    after_eos[:, 1:] = ids[:, :-1] == EOS
    after_eos[:, 0] = True
    for row, start in zip(positions, after_eos, strict=True):
        expected, at = [], 0
        for is_start in start:
            at = 0 if is_start else at + 1
            expected.append(at)
        assert row.tolist() == expected


def test_shares_follow_weights_and_copies_are_taken_once(tmp_path: Path) -> None:
    mine, yours, both = documents(500, 1), documents(500, 2), documents(100, 3)
    sources = {
        "mine": local(write_jsonl(tmp_path / "mine.jsonl", mine + both + mine), weight=3),
        "yours": local(write_jsonl(tmp_path / "yours.jsonl", yours + both), weight=1),
    }
    config = make_config(tmp_path, sources, tokens=12800)
    manifest = run(config)
    for name, share in (("mine", 0.75), ("yours", 0.25)):
        assert manifest["sources"][name]["wanted_share"] == share
        assert manifest["sources"][name]["reached_share"] == pytest.approx(share, rel=0.01)
        assert manifest["sources"][name]["tokens"] == share * 12800
    stage = json.loads((Plan(config).sample.folder / "stage.json").read_text())
    assert stage["metrics"]["sources"] == manifest["sources"]
    ids, positions = read_rows(config, "train")
    whole = [stretch for stretch in pieces(ids, positions) if stretch[-1] == EOS and len(stretch) > 15]
    assert len(whole) == len(set(whole)) > 150


def test_the_sides_share_no_document(tmp_path: Path) -> None:
    texts = documents(300)
    corpus = local(write_jsonl(tmp_path / "a.jsonl", texts + texts[::2]))
    config = make_config(tmp_path, {"a": corpus}, tokens=100_000, validation_tokens=64_000, allow_short=True)
    run(config)
    starts = {
        side: {stretch[:10] for stretch in pieces(*read_rows(config, side)) if len(stretch) >= 10}
        for side in ("train", "validation")
    }
    assert len(starts["train"]) > 100 and len(starts["validation"]) > 50
    assert not starts["train"] & starts["validation"]


def test_the_sample_depends_on_documents_and_seed_alone(tmp_path: Path) -> None:
    """Other files, another order, copies, several processes: the same shards. Another seed: others."""
    texts = documents(900)
    shuffled = random.Random(5).sample(texts, len(texts))
    files = [write_jsonl(tmp_path / f"part{n}.jsonl", shuffled[n::3]) for n in range(3)]
    one = make_config(tmp_path, {"a": local(write_jsonl(tmp_path / "one.jsonl", texts))}, name="one")
    many = make_config(tmp_path, {"a": local(*files, files[0])}, name="many")
    processes = make_config(tmp_path, {"a": local(*files)}, name="processes", num_workers=2)
    reseeded = make_config(tmp_path, {"a": local(*files)}, name="reseeded", seed=1)
    shards = {config.data.name: run(config)["shards"] for config in (one, many, processes, reseeded)}
    assert shards["one"] == shards["many"] == shards["processes"]
    assert not set(shards["one"].values()) & set(shards["reseeded"].values())


def test_shards_are_cut_by_size_and_named_by_count(tmp_path: Path) -> None:
    corpus = {"a": local(write_jsonl(tmp_path / "a.jsonl", documents(600)))}
    config = make_config(tmp_path, corpus, shard_tokens=64 * 30)
    whole = make_config(tmp_path, corpus, name="whole")
    manifest = run(config)
    names = sorted(path.name for path in Plan(config).sample.folder.glob("*.parquet"))
    assert names == [f"train-{n:05d}-of-00004.parquet" for n in range(4)] + ["validation-00000-of-00001.parquet"]
    assert sorted(manifest["shards"]) == names
    run(whole)
    assert all(
        np.array_equal(*pair) for pair in zip(read_rows(config, "train"), read_rows(whole, "train"), strict=True)
    )


def test_spelled_out_special_tokens_stay_text(tmp_path: Path) -> None:
    texts = [f"{text} <eos> w1" for text in documents(600)]
    config = make_config(tmp_path, {"a": local(write_jsonl(tmp_path / "a.jsonl", texts))})
    run(config)
    ids, positions = read_rows(config, "train")
    assert (positions[:, 1:][ids[:, :-1] == EOS] == 0).all()  # no end within a document
    assert 0 in ids  # `<eos>` in a text is an unknown word of this tokenizer


def test_finished_is_skipped_and_force_runs_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_config(tmp_path, {"a": local(write_jsonl(tmp_path / "a.jsonl", documents(400)))})
    before = run(config)
    run(config)
    assert ", skipped" in capsys.readouterr().out
    assert run(replace(config, force=True)) == before
    assert ", skipped" not in capsys.readouterr().out
    assert not (Plan(config).sample.folder / "work").exists()


def test_fraction_of_the_pretraining_tokens(tmp_path: Path) -> None:
    corpus = local(write_jsonl(tmp_path / "a.jsonl", documents(400)))
    config = make_config(tmp_path, {"a": corpus}, tokens=None, fraction=0.01)
    with pytest.raises(ValueError, match="model.pretrain_tokens"):
        run(config)
    config.model.pretrain_tokens = 320_000.0
    assert run(config)["tokens"] == 3200


def test_a_short_corpus_is_refused_unless_allowed(tmp_path: Path) -> None:
    texts = documents(400)
    sources = {
        "small": local(write_jsonl(tmp_path / "small.jsonl", texts[:200])),
        "large": local(write_jsonl(tmp_path / "large.jsonl", texts[200:])),
    }
    for tokens in (19_800, 40_000, 10_000_000):  # a little short, clearly short, short by the size of its files
        config = make_config(tmp_path, sources, tokens=tokens, name=f"of{tokens}")
        with pytest.raises(
            ValueError, match=r"smaller than the budget(.|\n)*data.sources.small holds (.|\n)*allow_short"
        ):
            run(config)
        assert not (Plan(config).sample.folder / "stage.json").exists()
    config = make_config(tmp_path, sources, tokens=40_000, allow_short=True)
    manifest = run(config)
    held = sum(len(stretch) for stretch in encoded(config, texts)) - manifest["validation_tokens"]
    assert 0.8 * held < manifest["tokens"] < held


def test_too_little_held_out_text_is_refused(tmp_path: Path) -> None:
    corpus = local(write_jsonl(tmp_path / "a.jsonl", documents(400)))
    with pytest.raises(ValueError, match="data.validation_tokens=20,000"):
        run(make_config(tmp_path, {"a": corpus}, tokens=640, validation_tokens=20_000))
    single = local(write_jsonl(tmp_path / "single.jsonl", documents(1, longest=20_000, shortest=20_000)))
    with pytest.raises(ValueError, match="more documents"):
        run(make_config(tmp_path, {"a": single}, allow_short=True))


def test_one_source_makes_up_for_anothers_held_out_text(tmp_path: Path) -> None:
    """A source of three documents, none of them held out, does not stop validation."""
    few, many = documents(3, 7, 300, 400), documents(600, 8)
    sources = {
        "few": local(write_jsonl(tmp_path / "few.jsonl", few), weight=1),
        "many": local(write_jsonl(tmp_path / "many.jsonl", many), weight=15),
    }
    config = make_config(tmp_path, sources)
    assert all(Split.of(config).place(Split.of(config).key(text))[0] == "train" for text in few), "choose other texts"
    manifest = run(config)
    assert manifest["sources"]["few"]["validation_tokens"] == 0
    assert manifest["validation_tokens"] == 640


def test_a_killed_run_continues_to_the_same_shards(tmp_path: Path) -> None:
    """SIGKILL while it runs; the parts already read are not read again."""
    texts = documents(24_000)
    files = [write_jsonl(tmp_path / f"part{n}.jsonl", texts[n::6]) for n in range(6)]
    sizes = {"tokens": 900_000, "validation_tokens": 32_000}
    config = make_config(tmp_path, {"a": local(*files)}, **sizes)
    overrides = tmp_path / "settings" / "experiment" / "killed.yaml"
    overrides.parent.mkdir(parents=True)
    settings = {"data": plain(config.data), "model": plain(config.model)}
    overrides.write_text("# @package _global_\n" + yaml.safe_dump({**settings, "output_dir": config.output_dir}))
    root = Path(__file__).parents[2]
    words = ["-m", "data.sample", f"hydra.searchpath=[file://{tmp_path}/settings]", "data=local", "experiment=killed"]
    process = subprocess.Popen([sys.executable, *words], cwd=root, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    folder = Plan(config).sample.folder
    while process.poll() is None and not list(folder.glob("work/texts/*.json")):
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    assert not (folder / "stage.json").exists() and not list(folder.glob("*.parquet"))
    kept = {path: path.stat().st_mtime_ns for path in folder.glob("work/texts/*.json")}
    assert kept

    manifest = run(config)
    assert not list(folder.parent.glob("*.old-*")), "the unfinished folder was not taken up"
    undisturbed = make_config(tmp_path, {"a": local(*files)}, name="undisturbed", **sizes)
    assert manifest["shards"] == run(undisturbed)["shards"]


@pytest.mark.parametrize(("end", "chat", "ended"), [("auto", True, False), ("auto", False, True), ("eos", True, True)])
def test_a_chat_model_s_end_of_turn_ends_no_document(end: str, chat: bool, ended: bool, tmp_path: Path) -> None:
    """Its eos ends turns: learnt behind plain text, it would end answers before they begin."""
    texts = documents(600)
    config = make_config(
        tmp_path, {"a": local(write_jsonl(tmp_path / "a.jsonl", texts))}, document_end=DocumentEnd(end), num_workers=2
    )
    if chat:
        tokenizer = AutoTokenizer.from_pretrained(config.model.path)
        tokenizer.chat_template = "{{ messages }}"
        tokenizer.save_pretrained(config.model.path)
    run(config)
    ids, positions = read_rows(config, "train")
    assert (ids == EOS).any() == ended
    tokens = {row[:-1] for row in encoded(config, texts)}
    found = [stretch[:-1] if ended else stretch for stretch in pieces(ids, positions)]
    assert sum(stretch in tokens for stretch in found) > 30  # whole documents, told apart by their positions
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    calibration = torch.cat(list(calibration_batches(config, tokenizer, tokens=512, sequence_length=32)))
    assert bool((calibration == EOS).any()) == ended


def test_documents_need_no_end_where_there_is_no_eos(tmp_path: Path) -> None:
    config = make_config(tmp_path, {"a": local(write_jsonl(tmp_path / "a.jsonl", documents(600)))})
    tokenizer = AutoTokenizer.from_pretrained(config.model.path)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(config.model.path)
    with pytest.raises(ValueError, match="no eos token to end documents with; use data.document_end=none"):
        sample(config)
    run(replace(config, data=replace(config.data, document_end=DocumentEnd.none)))
