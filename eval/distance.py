"""How far every model is from the original on every text, as a table with its notes."""

from typing import Any

from eval.tables import Rows, number, percent, whole

Results = dict[str, Any]


def divergence_of(results: Results, text: str, model: str) -> float | None:
    """KL to the original; None for reports that did not measure it."""
    return results.get("kl_divergence", {}).get(text, {}).get(model)


def text_rows(results: Results) -> tuple[list[str], Rows]:
    """Perplexity, KL to the original and agreement with its likeliest token on every text, by model."""
    texts, agreement = list(results["perplexity"]), results.get("top1_agreement", {})
    header = ["model", *(f"{kind} {text}" for text in texts for kind in ("perplexity", "KL", "top-1"))]
    rows = [
        [model]
        + [
            cell
            for text in texts
            for cell in (
                number(results["perplexity"][text].get(model), 2),
                number(divergence_of(results, text, model), 3),
                percent(agreement.get(text, {}).get(model), 1),
            )
        ]
        for model in results["score"]
    ]
    return header, rows


def text_notes(results: Results) -> str:
    """How much text each perplexity is measured on."""
    length = results["config"]["eval"]["perplexity_sequence_length"]
    texts = ", ".join(f"{text} {whole(tokens)} tokens" for text, tokens in results["perplexity_tokens"].items())
    return (
        f"Perplexity is exp of the mean loss over windows of at most {length} tokens: {texts}. KL: of the model's "
        "next-token distribution from the original's, KL(original || model), in nats a token on the same windows; "
        "top-1: how often the likeliest token is the original's. A model with a quantised cache is measured through it."
    )
