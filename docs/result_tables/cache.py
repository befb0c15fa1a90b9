"""Tables of caches in few bits, decoding and training speed."""

from result_tables.common import load, number, table, where


def cache_bits() -> str:
    """Perplexity of decoding through caches in few bits."""
    found = load("cache_bits")
    whole, *coded = found["rows"]
    rows = [["16", "16", "", "", f"{whole['bytes_per_token']:,.0f}", f"{-100 * whole['reduction']:.2f} %", ""]]
    for row in coded:
        ranges = "by channel" if row["calibrated"] else "by token"
        ranges = f"transformers' {row['stock']}" if row.get("stock") else ranges
        ranges = "control: one for all channels" if row.get("control") else ranges
        cells = [str(row["bits"]), str(row["rope_bits"]), ranges]
        cells += ["yes" if row["rotated"] else "", f"{row['bytes_per_token']:,.0f}", f"{-100 * row['reduction']:.2f} %"]
        rows.append([*cells, f"{100 * (row['against_whole'] - 1):+.1f} %"])
    kept = next(row["tokens_kept_whole"] for row in coded if row["tokens_kept_whole"])
    head = ["latent bits", "rotated key", "ranges", "turned", "bytes a token", "cache", "perplexity"]
    note = (
        f"{found['text']['tokens']:,} tokens of WikiText-2's test text, whole cache {number(whole['perplexity'])}; "
        f"{kept} tokens a sequence stay whole, not in the bytes, but for transformers'; ranges by channel from "
        f"{found['calibration_tokens']:,} tokens of other text; {where(found['provenance'])}. "
        "`docs/results/cache_bits.json`"
    )
    return table(head, rows) + "\n\n" + note


def bench() -> str:
    """Decoding against the original model."""
    found = load("bench")
    place, setting = found["grid"][0], found["bench"]
    whole = place["variants"]["absorbed"]["seconds_per_step"]
    rows = [
        [
            name,
            f"{row['speed_against_original']:.2f}x",
            f"{row['seconds_per_step'] / whole:.2f}x",
            f"{row['cache_against_original']:.4f}x",
            f"{row['step_memory_bytes'] / 2**30:.2f}",
        ]
        for name, row in place["variants"].items()
        if "failed" not in row
    ]
    note = (
        f"batch {place['batch']}, {place['context']:,} cached tokens, {setting['dtype']}; GiB: weights, cache and what "
        "a step takes beside them; cache bytes against the original's in 16 bits; "
        f"{where(found['provenance'])}. `docs/results/bench.json`"
    )
    head = ["decode", "tokens/s", "a step, against absorbed", "cache bytes", "GiB"]
    return table(head, rows) + "\n\n" + note


def train_bench() -> str:
    """A training step of every loss against cross-entropy."""
    found = load("train_bench")
    rows = [
        [name, f"{row['seconds_per_step']:.2f}", f"{row['time_against_ce']:.2f}x", f"{row['memory_against_ce']:.2f}x"]
        for name, row in found["losses"].items()
    ]
    sequences, length = found["tokens"]
    note = (
        f"{found['model']}, {sequences} x {length} tokens, {found['trainable']} trained, {found['mixed_precision']}; "
        f"{where(found['provenance'])}. `docs/results/train_bench.json`"
    )
    return table(["loss", "seconds a step", "time", "memory"], rows) + "\n\n" + note
