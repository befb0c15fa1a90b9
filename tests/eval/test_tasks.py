"""LongBench's prompts, lengths, scorers and stop rules, against what its own repository says."""

import pytest

from conf.evaluation import BUILTIN_TASKS, LONGBENCH_TASKS, EvalConfig, TaskSource
from eval.tasks import builtin_tasks, longbench_tasks, task_table

# dataset2maxlen.json of LongBench.
LENGTHS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "multifieldqa_zh": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "dureader": 128,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "vcsum": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "lsht": 64,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "passage_retrieval_zh": 32,
    "lcc": 64,
    "repobench-p": 64,
}


def row(question: str = "Q", context: str = "C", answers: tuple[str, ...] = ("A",), classes: object = None) -> dict:
    return {"input": question, "context": context, "answers": list(answers), "all_classes": classes, "_id": "0"}


def test_all_tasks_of_longbench_with_its_output_lengths():
    assert {name: task.max_new_tokens for name, task in longbench_tasks().items()} == LENGTHS
    assert set(LONGBENCH_TASKS) == set(LENGTHS)
    assert set(task_table(TaskSource.builtin)) == set(BUILTIN_TASKS)


@pytest.mark.parametrize(
    ("name", "end"),
    [
        ("passage_count", "1, 2, 3, and so on.\n\nThe final answer is: "),
        ("passage_retrieval_en", '"Paragraph 2", etc.\n\nThe answer is: '),
        ("passage_retrieval_zh", "答案是："),
        ("lcc", "Please complete the code given below. \nCNext line of code:\n"),
        ("repobench-p", "Please complete the code given below. \nCQNext line of code:\n"),
        ("triviaqa", "The following are some examples.\n\nC\n\nQ"),
        ("samsum", "The following are some examples.\n\nC\n\nQ"),
        ("trec", "Here are some examples of questions.\n\nC\nQ"),
        ("lsht", "下面是一些例子。\n\nC\nQ"),
        ("multi_news", "News:\nC\n\nNow, write a one-page summary of all the news.\n\nSummary:"),
        ("hotpotqa", "do not output any other words.\n\nQuestion: Q\nAnswer:"),
    ],
)
def test_prompts_are_longbenchs_to_the_last_space(name, end):
    assert longbench_tasks()[name].render(row()).endswith(end)


def test_text_with_template_marks_is_not_rendered_again():
    assert "{{ input }} <b>&amp;" in longbench_tasks()["qasper"].render(row(context="{{ input }} <b>&amp;"))


# Worked by hand from LongBench's metrics.py.
SCORES = [
    # qa_f1: "paris france" against "paris": precision 1/2, recall 1; case, articles and punctuation do not count.
    ("hotpotqa", "The Paris, France.", ("Paris",), None, 2 / 3),
    ("hotpotqa", "London", ("Paris", "london!"), None, 1.0),
    ("hotpotqa", "", ("Paris",), None, 0.0),
    # qa_f1_zh on jieba's words: 我 / 爱 / 北京 against 北京: precision 1/3, recall 1.
    ("multifieldqa_zh", "我爱北京。", ("北京",), None, 1 / 2),
    # rouge-l of the package rouge: longest common subsequence "the cat" of 3 and 2 words: P = 2/3, R = 1.
    ("gov_report", "the cat sat", ("the cat",), None, 0.8),
    ("gov_report", "", ("the cat",), None, 0.0),
    ("vcsum", "北京", ("北京",), None, 1.0),
    # classification: 1 / number of classes named, if the right one is; a class inside the right one is dropped.
    ("trec", "Color", ("Color",), ["Color", "City"], 1.0),
    ("trec", "Color or City", ("Color",), ["Color", "City"], 0.5),
    ("trec", "City", ("Color",), ["Color", "City"], 0.0),
    ("trec", "Other number", ("Other number",), ["number", "Other number"], 1.0),
    # retrieval and count: right numbers over all numbers named.
    ("passage_retrieval_en", "Paragraph 3", ("Paragraph 3",), None, 1.0),
    ("passage_retrieval_en", "3 or 4", ("Paragraph 3",), None, 0.5),
    ("passage_retrieval_en", "none", ("Paragraph 3",), None, 0.0),
    ("passage_retrieval_zh", "段落12", ("段落12",), None, 1.0),
    ("passage_count", "There are 7, not 8", ("7",), None, 0.5),
    ("passage_count", "17", ("7",), None, 0.0),
    # code_sim: the first line that is not blank, a comment or a fence; 2 * 6 / (6 + 7) = 0.923, a whole percent.
    ("lcc", "# note\n\nx = 1;\nmore", ("x = 10;",), None, 0.92),
    # "ababab" against "aaaaab": 2 * 4 / 12, where difflib would say 4 / 12.
    ("lcc", "ababab", ("aaaaab",), None, 0.67),
]


@pytest.mark.parametrize(("name", "output", "answers", "classes", "expected"), SCORES)
def test_scorers_on_cases_worked_by_hand(name, output, answers, classes, expected):
    score = longbench_tasks()[name].score(row(answers=answers, classes=classes), output)
    assert score == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["trec", "triviaqa", "samsum", "lsht"])
def test_only_the_first_line_counts_where_longbench_says_so(name):
    task = longbench_tasks()[name]
    right = row(answers=("gamma",), classes=["gamma", "delta"])
    assert task.score(right, "\n\ngamma\ndelta beta") == pytest.approx(1.0)
    assert task.score(right, "beta\ngamma") == 0.0
    # A control: elsewhere the whole output counts.
    assert longbench_tasks()["hotpotqa"].score(right, "beta\ngamma") == pytest.approx(2 / 3)


def test_no_chat_template_on_few_shot_and_code_tasks():
    without = {name for name, task in longbench_tasks().items() if not task.chat}
    assert without == {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name, task in builtin_tasks().items() if not task.chat} == {"classification", "code_completion"}


def test_every_task_carries_a_version():
    assert longbench_tasks()["lcc"].version == "6+1"
    assert all(task.version for task in [*longbench_tasks().values(), *builtin_tasks().values()])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": ["paskey"]}, "near ones: passkey"),
        ({"tasks": ["hotpot_qa"], "source": TaskSource.hub}, "hotpotqa"),
        ({"tasks": ["passkey"], "source": TaskSource.hub}, "no task 'passkey' in eval.source=hub"),
        ({"source": TaskSource.local}, "needs eval.data_dir"),
        ({"data_dir": "x"}, "eval.data_dir has no effect"),
        ({"limit": 0}, "eval.limit=0"),
        ({"perplexity_tokens": 10}, "less than eval.perplexity_sequence_length"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        EvalConfig(**options)
