"""Who is ahead at equal bytes: interpolated between baselines, said plainly, and drawn with what was measured."""

from pathlib import Path
from typing import Any

import pytest

from eval.frontier import rival, sentence, verdicts
from eval.frontier_picture import BASELINES, POINTS, distance, draw_frontier, lines

BYTES = {
    "original": 1600.0,
    "kivi-4": 400.0,
    "kivi-2": 100.0,
    "transform-2": 200.0,
    "converted": 150.0,
    "healed": 200.0,
}
KL = {"kivi-4": 0.1, "kivi-2": 0.9, "transform-2": 0.6, "converted": 2.0, "healed": 0.3}
PERPLEXITY = {"original": 20.0, "kivi-4": 21.0, "kivi-2": 29.0, "transform-2": 26.0, "converted": 70.0, "healed": 22.0}


def results(**changes: Any) -> dict[str, Any]:
    found = {
        "model": "m",
        "point": "p",
        "baselines": ["kivi-4", "kivi-2", "transform-2"],
        "cache": {name: {"bytes_per_token_16_bit": held} for name, held in BYTES.items()},
        "kv_cache_reduction": {name: 1 - held / 1600 for name, held in BYTES.items() if name != "original"},
        "perplexity": {"text": dict(PERPLEXITY)},
        "kl_divergence": {"text": dict(KL)},
    }
    return found | changes


def healed(kl: float | None, perplexity: float, held: float = 200.0) -> dict[str, Any]:
    cache = results()["cache"] | {"healed": {"bytes_per_token_16_bit": held}}
    cuts = results()["kv_cache_reduction"] | {"healed": 1 - held / 1600}
    texts = {
        "kl_divergence": {"text": KL | {"healed": kl}},
        "perplexity": {"text": PERPLEXITY | {"healed": perplexity}},
    }
    return results(cache=cache, kv_cache_reduction=cuts, **texts)


def test_between_two_baselines_of_a_method_a_loss_is_linear_in_the_logarithm_of_the_bytes() -> None:
    found = rival(results(), "healed", "kl_divergence", "text")  # halfway between 100 and 400; transform-2 has 0.6
    assert found is not None and found.value == pytest.approx(0.5) and found.names == ("kivi-2", "kivi-4")
    at_150 = rival(results(), "converted", "kl_divergence", "text")  # no transform so small
    assert at_150 is not None and at_150.value == pytest.approx(0.9 - 0.8 * 0.2925, abs=1e-3)
    large = rival(healed(0.3, 22.0, 800.0), "healed", "kl_divergence", "text")  # towards the original, which loses none
    assert large is not None and large.value == pytest.approx(0.05) and large.names == ("kivi-4", "original")
    better = results(kl_divergence={"text": KL | {"transform-2": 0.05}})  # of fewer bytes than kivi-4 and better
    found = rival(better, "healed", "kl_divergence", "text")
    assert found is not None and found.names == ("transform-2",)


@pytest.mark.parametrize(
    ("own", "said"),
    [
        (healed(0.3, 22.0), "is **ahead of the quantised original**, on text: KL 0.300 against 0.500"),
        (healed(0.7, 30.0), "is **behind the quantised original**"),
        (healed(0.3, 30.0), "is **ahead of the quantised original in KL and behind it in perplexity**"),
        (healed(0.5, 25.0), "is **level with the quantised original**"),
        (
            healed(0.3, 22.0, 50.0),
            "No quantised original measured is as small as the healed model: kivi-2 saves 93.75 %",
        ),
    ],
)
def test_the_sentence_says_who_is_ahead(own: dict[str, Any], said: str) -> None:
    found = sentence(own)
    assert found is not None and said in found, found


def test_without_baselines_or_bytes_nothing_is_said_and_a_missing_distance_stays_missing() -> None:
    assert sentence(results(baselines=[])) is None
    old = {name: value for name, value in results().items() if name not in ("baselines", "kl_divergence")}
    assert sentence(old) is None and verdicts(old) == {}
    unmeasured = results(cache={name: {"bytes_per_token_16_bit": None} for name in BYTES})
    assert sentence(unmeasured) is None
    assert list(verdicts(healed(None, 22.0))) == ["perplexity"]


def test_the_picture_has_a_line_a_kind_and_shared_baselines_once(tmp_path: Path) -> None:
    points = [results(), results(point="q")]
    found = lines(points, lambda point, model: distance(point, "text", model))
    assert set(found) == {*BASELINES.values(), *POINTS.values()}
    assert [label for _, _, label in found[BASELINES["kivi"]]] == ["4 bit", "2 bit"]
    assert draw_frontier(points, tmp_path / "frontier.png", "title")
    assert (tmp_path / "frontier.png").read_bytes().startswith(b"\x89PNG")
    # Of reports without distances only the perplexity is drawn, and nothing where no bytes were measured.
    old = {name: value for name, value in results().items() if name not in ("baselines", "kl_divergence")}
    assert draw_frontier([old], tmp_path / "old.png", "title")
    assert not draw_frontier([old | {"kv_cache_reduction": {"healed": None}}], tmp_path / "none.png", "title")
    assert not (tmp_path / "none.png").exists()
