"""The generation tasks by name: prompt, output length, scorer and stop rule of each.

LongBench's come from lm_eval's task files; where those differ from LongBench's own repository, in white
space of the prompt or in the first-line rule, LongBench's is restored (`_RESTORED`, `_FIRST_LINE`). The
built-in tasks are rows of the same form (eval/builtin.py) with the same scorers. No model is loaded here.
"""

import importlib
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from conf.evaluation import BUILTIN_TASKS, LONGBENCH_TASKS, TaskSource

Row = dict[str, Any]
Scorer = Callable[[Row, list[str]], dict[str, float]]


@dataclass(frozen=True)
class Task:
    """One task. `version` changes whenever its prompts, rows or scorer do: scores compare within a version only."""

    name: str
    prompt: str  # a jinja template over the row's fields; LongBench's `input` is also called `question`
    max_new_tokens: int
    scorer: Scorer
    version: str
    first_line: bool = False  # only the first non-empty line of the output counts
    newline_ends: bool = False  # a newline token ends generation, from the second token on (samsum)
    chat: bool = True  # whether a chat template may wrap the prompt
    answer_form: str = ""  # how the scorer wants answers that are numbers, {} for the number
    has_classes: bool = False  # whether the scorer chooses among the row's classes

    def fit(self, row: Row) -> Row:
        """The row as the scorer reads it; ValueError where it cannot."""
        classes = row["all_classes"]
        named = isinstance(classes, list) and classes and all(isinstance(each, str) and each for each in classes)
        if self.has_classes and not named:
            raise ValueError(f"has no list of texts as all_classes, among which the task {self.name} chooses")
        return row | {"answers": [self._fit_answer(each) for each in row["answers"]]}

    def _fit_answer(self, answer: str) -> str:
        if not self.answer_form:
            return answer
        if re.fullmatch(r"\d+", answer.strip()):
            return self.answer_form.format(answer.strip())
        before = self.answer_form.format("")
        if not before or not re.search(rf"{before}\d", answer):
            raise ValueError(f"has the answer {answer[:100]!r}; the task {self.name} wants a whole number")
        return answer

    def render(self, row: Row) -> str:
        from lm_eval.utils import apply_template

        return apply_template(self.prompt, row | {"question": row["input"]})

    def score(self, row: Row, output: str) -> float:
        """Score of one output between 0 and 1: the best over the row's answers."""
        if self.first_line:
            output = output.lstrip("\n").split("\n")[0]
        return float(self.scorer(self.fit(row), [output])["score"])


# LongBench's prompts end in white space that lm_eval's files drop, and separate two examples by an empty line.
_RESTORED = {
    "passage_count": ("The final answer is:", "The final answer is: "),
    "passage_retrieval_en": ("The answer is:", "The answer is: "),
    "lcc": ("Next line of code:", "Next line of code:\n"),
    "repobench-p": ("Next line of code:", "Next line of code:\n"),
    "triviaqa": ("{{context}}\n{{question}}", "{{context}}\n\n{{question}}"),
    "samsum": ("{{context}}\n{{question}}", "{{context}}\n\n{{question}}"),
}
_REVISION = 1  # of the changes made here to lm_eval's tasks; part of the version
# lm_eval stops these at any newline, so that an output that begins with one scores 0; LongBench skips it.
_FIRST_LINE = {"trec", "triviaqa", "samsum", "lsht"}
_NO_CHAT = _FIRST_LINE | {"lcc", "repobench-p"}
_ANSWER_FORMS = {"passage_retrieval_en": "Paragraph {}", "passage_retrieval_zh": "段落{}", "passage_count": "{}"}
_CLASSES = {"trec", "lsht"}


@cache
def longbench_tasks() -> dict[str, Task]:
    """LongBench v1's 21 tasks as lm_eval describes them."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    folder = Path(lm_eval.__file__).parent / "tasks" / "longbench"
    index = TaskManager(include_path=str(folder), include_defaults=False).task_index
    scorers = longbench_metrics()
    tasks = {}
    for name in LONGBENCH_TASKS:
        cfg = index[f"longbench_{name}"].cfg
        tasks[name] = Task(
            name=name,
            prompt=_restore(cfg["doc_to_text"], *_RESTORED.get(name, ("", ""))),
            max_new_tokens=cfg["generation_kwargs"]["max_gen_toks"],
            scorer=getattr(scorers, cfg["process_results"].rpartition(".")[2]),
            version=f"{cfg['metadata']['version']:g}+{_REVISION}",
            first_line=name in _FIRST_LINE,
            newline_ends=name == "samsum",
            chat=name not in _NO_CHAT,
            answer_form=_ANSWER_FORMS.get(name, ""),
            has_classes=name in _CLASSES,
        )
    return tasks


def _restore(prompt: str, wrong: str, right: str) -> str:
    assert wrong in prompt and not (right and right in prompt), f"lm_eval's prompt has changed: {prompt!r}"
    return prompt.replace(wrong, right) if wrong else prompt


_PASSKEY = """\
A pass key is hidden in the text below. Find it and remember it.

{{context}}

{{question}} The pass key is"""

_KEY_VALUE = """\
Extract the value of one key from the JSON object below.

{{context}}

The value of "{{question}}" is \""""

_PASSAGE_RETRIEVAL = """\
Here are some numbered paragraphs, then a sentence from one of them. Please determine which paragraph the sentence is \
from.

{{context}}

The following is the sentence.

{{question}}

Please enter the number of the paragraph that the sentence is from. The answer format must be like "Paragraph 1", \
"Paragraph 2", etc.

The answer is: Paragraph"""

_PASSAGE_COUNT = """\
There are some paragraphs below. Some of them may be duplicates. Please determine how many unique paragraphs there are \
after removing duplicates.

{{context}}

Please enter the final count of unique paragraphs after removing duplicates. The output format should only contain \
the number, such as 1, 2, 3, and so on.

The final answer is:"""

_CLASSIFICATION = """\
Please determine the topic of the last description below. Here are some examples.

{{context}}
{{question}}"""

_CODE_COMPLETION = """\
Please complete the code given below.
{{context}}"""


@cache
def builtin_tasks() -> dict[str, Task]:
    """The six tasks that need no download, scored as LongBench scores their like."""
    metrics = longbench_metrics()
    count, retrieval = metrics.get_count_with_score, metrics.get_retrieval_with_score
    classes, code = metrics.get_classification_with_score, metrics.get_code_sim_with_score
    tasks = (
        Task("passkey", _PASSKEY, 12, count, "2", first_line=True),
        Task("key_value", _KEY_VALUE, 8, count, "1", first_line=True),
        Task("passage_retrieval", _PASSAGE_RETRIEVAL, 8, retrieval, "1", first_line=True),
        Task("passage_count", _PASSAGE_COUNT, 8, count, "1", first_line=True),
        Task("classification", _CLASSIFICATION, 12, classes, "1", first_line=True, chat=False),
        Task("code_completion", _CODE_COMPLETION, 32, code, "1", first_line=True, chat=False),
    )
    assert tuple(task.name for task in tasks) == BUILTIN_TASKS
    return {task.name: task for task in tasks}


def task_table(source: TaskSource) -> dict[str, Task]:
    return builtin_tasks() if source is TaskSource.builtin else longbench_tasks()


@cache
def longbench_metrics() -> ModuleType:
    """lm_eval's LongBench scorers, with rapidfuzz in the place of fuzzywuzzy.

    fuzzywuzzy's ratio depends on whether python-Levenshtein happens to be installed: with it, it is the
    ratio that rapidfuzz computes; without, difflib's, up to 31 points away on lines of code.
    """
    import jieba

    jieba.setLogLevel("WARNING")  # or it tells of its dictionary
    with rapidfuzz_for_fuzzywuzzy():
        return importlib.import_module("lm_eval.tasks.longbench.metrics")


@contextmanager
def rapidfuzz_for_fuzzywuzzy() -> Iterator[None]:
    """What is imported meanwhile finds rapidfuzz's ratio under fuzzywuzzy's name."""
    from rapidfuzz import fuzz

    stand_in, functions = ModuleType("fuzzywuzzy"), ModuleType("fuzzywuzzy.fuzz")
    functions.ratio = lambda a, b: round(fuzz.ratio(a, b))  # type: ignore[attr-defined]
    stand_in.fuzz = functions  # type: ignore[attr-defined]
    before = sys.modules.get("fuzzywuzzy")
    sys.modules["fuzzywuzzy"] = stand_in
    try:
        yield
    finally:
        del sys.modules["fuzzywuzzy"]
        if before:
            sys.modules["fuzzywuzzy"] = before
