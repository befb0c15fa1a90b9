"""Built-in tasks: rows of LongBench's eight fields, made from text that the environment carries.

A row is the largest of its kind that fits the prompt budget: each generator draws all its random choices
first and returns `make(n)`, the row with `n` pieces of context, and `most_that_fit` finds the largest `n`. The same
seed, budget, tokenizer and Python version give the same rows, and one row does not depend on another.

Pass keys lie on a grid of depths and lengths, so that scores can be seen by both (eval/needle_picture.py).
"""

import json
import random
from collections.abc import Callable

from eval.tasks import Row, Task
from eval.text import code_files, passages, topic_sentences

Make = Callable[[int], Row]
DEFAULT_ROWS = 50
DEPTHS, LENGTHS = 5, 4  # of the grid of pass keys


def builtin_rows(task: Task, rows: int, seed: int, fits: Callable[[str], bool]) -> list[Row]:
    """`rows` rows of a built-in task; `fits` says whether a rendered prompt is within the budget."""
    generate = GENERATORS[task.name]
    made = []
    for index in range(rows):
        rng = random.Random(f"{task.name}-{seed}-{index}")
        cell = grid_cell(index) if task.name == "passkey" else None
        make, most = generate(rng, cell["depth"] if cell else index / max(rows - 1, 1))
        pieces = most_that_fit(make, most, lambda row: fits(task.render(row)))
        if not pieces:
            raise ValueError(f"eval.max_length is too small for the shortest prompt of the built-in task '{task.name}'")
        row = make(max(1, round(cell["share"] * pieces))) | cell if cell else make(pieces)
        words = len(row["context"].split())
        made.append(row | {"length": words, "dataset": task.name, "_id": f"{task.name}-{seed}-{index}"})
    return made


def grid_cell(index: int) -> dict[str, float]:
    """Depth in the context and share of the budget of one row.

    Their numbers have no common divisor: any five rows have all depths, any four all lengths, any twenty all cells.
    """
    return {"depth": 2 * index % DEPTHS / (DEPTHS - 1), "share": (index % LENGTHS + 1) / LENGTHS}


def most_that_fit(make: Make, most: int, fits: Callable[[Row], bool]) -> int:
    """The largest n ≤ `most` whose `make(n)` fits; 0 if not even one piece does."""
    best, low, high = 0, 1, most
    step = 1  # doubled until a row is too long: texts far beyond the budget are never tokenised
    while low <= high:
        trial = min(step, high) if step else (low + high) // 2
        if fits(make(trial)):
            best, low, step = trial, trial + 1, 2 * step
        else:
            high, step = trial - 1, 0
    return best


def _row(question: str, context: str, answer: str, classes: list[str] | None = None, language: str = "en") -> Row:
    return {"input": question, "context": context, "answers": [answer], "all_classes": classes, "language": language}


def _shuffled(rng: random.Random, pieces: tuple[str, ...]) -> list[str]:
    return rng.sample(pieces, len(pieces))


def passkey(rng: random.Random, depth: float) -> tuple[Make, int]:
    """A number hidden in unrelated paragraphs, at some depth of them."""
    texts, key = _shuffled(rng, passages()), str(rng.randint(10000, 99999))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."

    def make(n: int) -> Row:
        place = round(depth * n)
        return _row("What is the pass key?", "\n".join([*texts[:place], needle, *texts[place:n]]), key)

    return make, len(texts)


def key_value(rng: random.Random, depth: float) -> tuple[Make, int]:
    """One pair of a JSON object of words and five-digit numbers."""
    words = sorted({word for text in passages() for word in text.split() if word.isalpha() and 4 <= len(word) <= 9})
    keys = rng.sample(words, len(words))
    values = [str(rng.randint(10000, 99999)) for _ in keys]

    def make(n: int) -> Row:
        wanted = round(depth * (n - 1))
        lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in zip(keys[:n], values, strict=False)]
        return _row(keys[wanted], "{\n" + ",\n".join(lines) + "\n}", values[wanted])

    return make, len(keys)


def passage_retrieval(rng: random.Random, depth: float) -> tuple[Make, int]:
    """Which of the numbered paragraphs a sentence is from."""
    texts = _shuffled(rng, tuple(text for text in passages() if text.count(". ") >= 1))
    place, pick = rng.random(), rng.random()

    def make(n: int) -> Row:
        wanted = int(place * n)
        sentences = texts[wanted].rstrip(".").split(". ")
        sentence = max(sentences[int(pick * len(sentences)) :], key=len) + "."
        context = "\n\n".join(f"Paragraph {number}: {text}" for number, text in enumerate(texts[:n], 1))
        return _row(sentence, context, f"Paragraph {wanted + 1}")

    return make, len(texts)


def passage_count(rng: random.Random, depth: float) -> tuple[Make, int]:
    """How many distinct paragraphs there are; from row to row fewer or more of them repeat an earlier one."""
    texts, repeats = _shuffled(rng, passages()), rng.uniform(0.1, 0.7)
    sequence: list[int] = []  # which text stands at each place
    distinct = 0
    for _ in texts:
        if distinct and rng.random() < repeats:
            sequence.append(rng.randrange(distinct))
        else:
            sequence.append(distinct)
            distinct += 1

    def make(n: int) -> Row:
        context = "\n\n".join(f"Paragraph {place}: {texts[which]}" for place, which in enumerate(sequence[:n], 1))
        return _row("", context, str(len(set(sequence[:n]))))

    return make, len(sequence)


def classification(rng: random.Random, depth: float) -> tuple[Make, int]:
    """The topic of a sentence after examples of all topics, as LongBench's trec."""
    pools = {topic: _shuffled(rng, sentences) for topic, sentences in topic_sentences().items()}
    topics = sorted(pools)
    asked = rng.choice(topics)
    question = pools[asked].pop()
    examples = []
    while any(pools.values()):  # rounds over the topics, in a new order each: any prefix is balanced
        for topic in rng.sample(topics, len(topics)):
            if pools[topic]:
                examples.append(f"Description: {pools[topic].pop()}\nTopic: {topic}")

    def make(n: int) -> Row:
        return _row(f"Description: {question}\nTopic:", "\n".join(examples[:n]), asked, classes=topics)

    return make, len(examples)


def code_completion(rng: random.Random, depth: float) -> tuple[Make, int]:
    """The next line of a module of the standard library, as LongBench's lcc."""
    lines, targets = rng.choice(code_files())
    target = rng.choice(targets)

    def make(n: int) -> Row:
        # No newline at the end: tokenizers join it with the indentation that the next line begins with.
        context = "\n".join(lines[max(target - n, 0) : target])
        return _row("", context, lines[target].rstrip(), language="python")

    return make, target


GENERATORS: dict[str, Callable[[random.Random, float], tuple[Make, int]]] = {
    "passkey": passkey,
    "key_value": key_value,
    "passage_retrieval": passage_retrieval,
    "passage_count": passage_count,
    "classification": classification,
    "code_completion": code_completion,
}
