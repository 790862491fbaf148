"""The outcome reward with the real math-verify: what is right, what must not pay, what must not hang."""

import math
import os
import pickle
import signal
import time

import pytest

from pte_trl.evaluation.config import EvaluationArguments
from pte_trl.evaluation.records import read_records, write_records
from pte_trl.evaluation.regrade import regrade
from pte_trl.rewards.characters import join_digits
from pte_trl.rewards.functions import AccuracyReward, FormatReward
from pte_trl.rewards.grader import Grader, Verdict, check_golds, has_boxed, last_boxed
from pte_trl.rewards.worker_pool import verdict_versions

TOWER = r"\boxed{9^{9^{9^9}}}"


def grade(grader: Grader, gold: str, completion: str) -> Verdict:
    return grader.grade([gold], [completion])[0]


# What is right.


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/2", "0.5"),
        ("1/2", r"\frac12"),
        ("0.5", r"\dfrac{1}{2}"),
        ("1000", "1,000"),
        ("1,234,567", "1234567"),
        ("1000", r"1{,}000"),
        ("1000", r"1\,000"),
        ("69, 84", "84, 69"),
        (r"\{1,2\}", r"\left\{2, 1\right\}"),
        ("x^2-1", "(x-1)(x+1)"),
        (r"2\sqrt{2}", r"\sqrt{8}"),
        ("5", "x = 5"),
        ("5", "$5$"),
        ("5", r"5 \text{ cm}"),
        ("$5$", r"\(5\)"),
        (r"\boxed{5}", "5\n"),
        ("(0,4]", "(0, 4]"),
        ("4.5e33", r"4.5 \times 10^{33}"),
        (r"4.5 \times 10^{33}", "4.5e33"),
        ("1.6e-19", r"1.60 \cdot 10^{-19}"),
        ("2E+3", "2000"),
    ],
)
def test_equal_forms_are_correct(grader, gold, answer):
    assert grade(grader, gold, rf"So the answer is $\boxed{{{answer}}}$.").reason == "correct"


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("1/2", "0.51"),
        ("1000", "100"),
        ("69, 84", "69"),
        ("5", "3 \\text{ or } 5"),
        ("5", "1, 2, 3, 4, 5"),
        ("5", r"\pm 5"),
        ("(0,4]", "(0,4)"),
        ("4.5e33", r"4.6 \times 10^{33}"),
        ("4.5e33", r"4.5 \times 10^{34}"),
        # math-verify alone takes these for equal: it rounds to six decimals and drops what is below 1e-15
        ("1.24e-8", "0.0"),
        ("1.24e-8", "0.0000001"),
        ("1.6e-19", "1.5e-19"),
        ("1.6e-19", "x = 1.5e-19"),
    ],
)
def test_other_values_are_wrong(grader, gold, answer):
    assert grade(grader, gold, rf"\boxed{{{answer}}}") == Verdict(False, answer, "wrong")


@pytest.mark.parametrize(
    ("completion", "reason"),
    [
        (r"\boxed{4} no, \boxed{5}", "correct"),
        (r"\boxed{5} no, \boxed{4}", "wrong"),
        (r"\boxed{5}, \boxed{4}", "wrong"),
        (r"\boxed{4} and \boxed{5}", "correct"),
        (r"\boxed{5} or $\boxed{6}$ or \boxed{7}", "wrong"),
        (r"\boxed{5}, that is, \boxed{}", "unparsable"),
        (r"The answer is \boxed{5}. " + "Some afterthought. " * 1000, "correct"),
        (r"\boxed{\boxed{5}}", "correct"),
        (r"\boxed{5} and then \boxed{6", "correct"),
        ("so the answer is 5.", "correct"),
        ("the answer is $4$. No: the answer is $5$.", "correct"),
        ("the answer is $5$. No: the answer is $4$.", "wrong"),
        ("the answer is 5. " + "Or is it really? " * 1000, "unparsable"),
        ("I do not know", "unparsable"),
    ],
)
def test_only_the_final_answer_counts(grader, completion, reason):
    assert grade(grader, "5", completion).reason == reason


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"\boxed{1}\boxed{ 2 }", " 2 "),
        (r"\boxed {\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1\}}", r"\{1\}"),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (r"a \\\boxed{3}", "3"),
        (r"} \boxed{3} {", "3"),
        (r"\boxed{3", None),
        ("boxed{3}", None),
        ("", None),
    ],
)
def test_last_boxed(text, content):
    assert last_boxed(text) == content
    assert has_boxed(text) == (content is not None)


def test_scientific_notation():
    assert join_digits("-4.5e+33") == r"-4.5 \times 10^{33}"
    for unchanged in ("x2e5", "1e5_{16}", "2e^3", "1.2e3.4", "2e5x"):
        assert join_digits(unchanged) == unchanged


# What must not hang, crash or cost much.

NASTY = [
    (TOWER, "timeout"),
    ("answer: $9^{9^{9^9}}$", "timeout"),
    (r"\boxed{(10^7)!}", "wrong"),  # its value is known without its digits
    (r"\boxed{2^{2^{2^{2^{2^2}}}}}", "wrong"),
    (r"\boxed{" + "(" * 400 + "5" + ")" * 400 + "}", "timeout"),
    (r"\boxed{" + r"\frac{1}{2}+" * 40_000 + "1}", "unparsable"),
    (r"\boxed{" + "7" * 5_000 + "}", "unparsable"),
    (r"\boxed{" + "7" * 900 + "}", "wrong"),
    (r"\boxed{" * 10_000, "unparsable"),
    (r"\boxed{" * 10_000 + "5" + "}" * 10_000, "correct"),
    (r"\(\boxed{x" * 2_000, "unparsable"),
    (r"\(\boxed{x\}" * 2_000, "unparsable"),
    ("{" * 1_000_000, "unparsable"),
    ("x" * 5_000_000, "unparsable"),
    ("$" * 4_000, "unparsable"),
    (r"\(" * 2_000, "unparsable"),
    (r"\boxed{\frac{}", "unparsable"),
    (r"\boxed{\frac{1}{}}", "unparsable"),
    (r"\boxed{\left\{5\right.}", "unparsable"),
    (r"\boxed{1/0}", "wrong"),
    ("", "unparsable"),
    (r"\boxed{}", "unparsable"),
    (r"\boxed{ $ $ }", "unparsable"),
    ("\x00", "unparsable"),
    ("\\boxed{\x00}", "unparsable"),
    ("\ud800", "unparsable"),
    ("\\boxed{\ud800}", "unparsable"),
    ("\\boxed{5} \ud800", "correct"),
]


def test_nasty_completions(grader):
    completions = [completion for completion, _ in NASTY]
    start = time.process_time(), time.monotonic()
    verdicts = grader.grade(["5"] * len(NASTY), completions)
    for (completion, reason), verdict in zip(NASTY, verdicts, strict=True):
        assert verdict.reason == reason, f"{completion[:50]!r}: {verdict.reason}, not {reason}"
        assert verdict.correct == (reason == "correct")
        assert len(verdict.extracted or "") <= 2000
    assert time.process_time() - start[0] < 10  # s in this process
    assert time.monotonic() - start[1] < 60
    assert grade(grader, "5", r"\boxed{5}").correct


def test_a_group_with_one_answer_is_compared_once(grader):
    start = time.monotonic()
    verdicts = grader.grade(["5"] * 16 + ["6"], [TOWER] * 16 + [r"\boxed{6}"])
    assert [verdict.reason for verdict in verdicts] == ["timeout"] * 16 + ["correct"]
    assert time.monotonic() - start < 14  # 1 s of CPU time once, not sixteen times


def test_order_is_kept(grader):
    numbers = [str(number) for number in range(100)]
    verdicts = grader.grade(numbers, [rf"\boxed{{{number}}}" for number in numbers])
    assert [verdict.extracted for verdict in verdicts] == numbers
    assert all(verdict.correct for verdict in verdicts)
    shifted = grader.grade(numbers[1:], [rf"\boxed{{{number}}}" for number in numbers[:-1]])
    assert not any(verdict.correct for verdict in shifted)


def test_lengths_must_agree(grader):
    with pytest.raises(ValueError, match="2 gold answers for 1 completions"):
        grader.grade(["1", "2"], [r"\boxed{1}"])
    assert grader.grade([], []) == []


# Gold answers.

# Forms that occur in the benchmarks and that math-verify, given them as they stand, reads as something else
# or not at all; beside each, an answer that must be rewarded.
KNOWN_BAD_GOLDS = [
    ("4.5e33", r"4.5 \times 10^{33}"),
    ("1.325e-27", "1.325e-27"),
    ("1e-5", "0.00001"),
    ("6.5e-2", "0.065"),
    ("025", "25"),
    ("27.0", "27"),
    ("$ 5 $", "5"),
    ("7\n", "7"),
    (r"\$32,\!348.89", "32348.89"),
    ("16,3,1,1", "16, 3, 1, 1"),
]


def test_known_bad_golds_are_read_and_matched(grader):
    golds, answers = zip(*KNOWN_BAD_GOLDS, strict=True)
    assert check_golds([{"answer": gold} for gold in golds], grader=grader) == len(golds)
    verdicts = grader.grade(list(golds), [rf"\boxed{{{answer}}}" for answer in answers])
    assert [gold for gold, verdict in zip(golds, verdicts, strict=True) if not verdict.correct] == []


def test_unparsable_gold_names_the_row(grader):
    rows = [{"id": "aime/1", "target": "5"}, {"id": "aime/2", "target": "$ $"}]
    with pytest.raises(ValueError, match=r"1 gold answers: row aime/2: target='\$ \$' \(bad gold\)$"):
        check_golds(rows, key="target", grader=grader)
    with pytest.raises(ValueError, match=r"row 1: answer=None \(missing\)"):
        check_golds([{"answer": 5}, {}], grader=grader)
    with pytest.raises(ValueError, match=r"row 0: answer='9\^\{9\^\{9\^9\}\}' \(timeout\)"):
        check_golds([{"answer": "9^{9^{9^9}}"}], grader=grader)
    with pytest.raises(ValueError, match=r"8 gold answers: .* and 3 more$"):
        check_golds([{"answer": ""}] * 8, grader=grader)


def test_a_gold_that_fails_under_load_is_tried_again_alone():
    with Grader(workers=1, time_limit=0.5) as grader:
        assert grade(grader, "5", r"\boxed{5}").correct
        os.kill(grader._pool.pids()[0], signal.SIGSTOP)  # it misses the wall-clock limit
        assert check_golds([{"answer": "12"}], grader=grader) == 1


def test_grading_against_an_unparsable_gold_is_an_error(grader):
    with pytest.raises(ValueError, match="cannot read the gold answer ''"):
        grader.grade(["5", ""], [r"\boxed{5}", r"\boxed{5}"])


def test_a_gold_is_checked_once(grader):
    with Grader(workers=1) as fresh:
        assert check_golds([{"answer": "12"}] * 3, grader=fresh) == 3
        fresh.close()
        assert check_golds([{"answer": "12"}], grader=fresh) == 1
        assert fresh._pool.pids() == []  # nothing was left to ask a worker


# The reward functions.


def test_accuracy_reward(grader):
    reward = AccuracyReward(grader)
    assert reward.__name__ == "accuracy_reward"
    texts = [r"\boxed{5}", r"\boxed{4}", "none", TOWER]
    metrics = {}
    kwargs = {"completion_ids": [[0]] * 4, "trainer_state": None, "log_extra": None}
    rewards = reward(["q"] * 4, texts, answer=["5", 5, "5", "5"], log_metric=metrics.__setitem__, **kwargs)
    assert rewards == [1.0, 0.0, 0.0, 0.0]
    assert metrics == {
        "accuracy_reward/unparsable": 0.25,
        "accuracy_reward/timeout": 0.25,
        "accuracy_reward/crashed": 0.0,
    }


def test_conversations(grader):
    texts = [r"\boxed{5}", r"\boxed{4}"]
    conversations = [[{"role": "assistant", "content": text}] for text in texts]
    conversations += [
        [{"role": "assistant", "content": r"\boxed{4}"}, {"role": "assistant", "content": r"\boxed{5}"}],
        [{"role": "assistant", "content": [{"type": "text", "text": r"\boxed{5}"}]}],
        [{"role": "assistant", "content": None}],
        [],
    ]
    prompts = [[{"role": "user", "content": "2+3?"}]] * 6
    assert AccuracyReward(grader)(prompts, conversations, answer=["5"] * 6) == [1.0, 0.0, 1.0, 1.0, 0.0, 0.0]
    assert FormatReward()(completions=conversations, answer=["5"] * 6) == [1.0, 1.0, 1.0, 1.0, 0.0, 0.0]


def test_accuracy_reward_can_be_pickled(grader):
    reward = AccuracyReward(grader)
    reward(["q"], [r"\boxed{5}"], answer=["5"])
    copy = pickle.loads(pickle.dumps(reward))
    assert copy.__name__ == "accuracy_reward"
    assert copy(["q"], [r"\boxed{5}"], answer=["5"]) == [1.0]
    assert set(copy.grader._pool.pids()).isdisjoint(grader._pool.pids())
    copy.grader.close()


def test_format_reward():
    completions = [
        r"\boxed{5}",
        "5",
        r"\boxed{5",
        r"\boxed{ }",
        r"\boxed{}",
        r"\boxed{5}\boxed{}",
        "",
        r"$\boxed{x}$.",
    ]
    assert FormatReward()(completions=completions) == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]


# Only what follows a marker.

THOUGHTS = [
    (r"<think> \boxed{5} </think> The answer is \boxed{5}.", "correct", 1.0),
    (r"so \boxed{4} </think> \boxed{5}", "correct", 1.0),
    (r"<think> \boxed{5} </think> \boxed{4}", "wrong", 1.0),
    (r"<think> \boxed{5} </think> I do not know", "unparsable", 0.0),
    (r"<think> \boxed{5} </think>", "unparsable", 0.0),
    (r"<think> \boxed{5}", "unparsable", 0.0),
    (r"\boxed{5}", "unparsable", 0.0),
    ("<think> </think> the answer is 5.", "correct", 0.0),
    (r"</think> \boxed{4} </think> \boxed{5}", "correct", 1.0),
]


def test_only_what_follows_the_marker_is_graded(grader):
    texts = [text for text, _, _ in THOUGHTS]
    verdicts = grader.grade(["5"] * len(texts), texts, answer_after="</think>")
    assert [verdict.reason for verdict in verdicts] == [reason for _, reason, _ in THOUGHTS]
    with Grader(workers=1, answer_after="</think>") as marked:
        assert marked.grade(["5"] * len(texts), texts) == verdicts
        copy = pickle.loads(pickle.dumps(marked))
        assert copy.answer_after == "</think>"
    boxed = [share for _, _, share in THOUGHTS]
    assert FormatReward("</think>")(completions=texts) == boxed
    assert [has_boxed(text, "</think>") for text in texts] == [bool(share) for share in boxed]


def test_what_is_no_text_is_named(grader):
    with pytest.raises(ValueError, match=r"golds\[1\]=5: must be a text"):
        grader.grade(["5", 5], ["5", "5"])
    with pytest.raises(ValueError, match=r"completions\[0\]=None: must be a text"):
        grader.grade(["5"], [None])
    with pytest.raises(ValueError, match="the dataset has no column 'answer'"):
        AccuracyReward(grader)(["prompt"], ["5"])


@pytest.mark.parametrize("marker", ["", "  ", 5])
def test_a_marker_that_marks_nothing_is_refused(marker):
    for make in (lambda: Grader(answer_after=marker), lambda: FormatReward(marker)):
        with pytest.raises(ValueError, match=r"^answer_after=.*: must be a text such as '</think>', or left out"):
            make()


def test_records_are_graded_again_as_they_say_or_as_is_asked(tmp_path, grader):
    made = {"problem_id": "p", "finish_reason": "stop", "tokens": 5, "evictions": 0, "contaminated": False}
    rows = [
        made | {"sample": n, "gold": "5", "completion": text, "correct": right, "answer_after": "</think>"}
        for n, (text, right) in enumerate(((r"<think> \boxed{5} </think> \boxed{4}", False), (r"\boxed{5}", False)))
    ]
    write_records(tmp_path, rows)
    assert regrade(tmp_path, grader) == 0
    first = read_records(tmp_path)[0]
    assert first["answer_after"] == "</think>" and verdict_versions().items() <= first.items()
    assert regrade(tmp_path, grader, answer_after="<think>") == 0
    write_records(tmp_path, [row | {"answer_after": None} for row in rows])
    assert regrade(tmp_path, grader) == 1
    write_records(tmp_path, [rows[0], rows[1] | {"answer_after": None}])
    with pytest.raises(ValueError, match=r"records with answer_after=\['</think>', 'None'\]; give one of them"):
        regrade(tmp_path, grader)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"answer_after": " "}, "answer_after=' ': must be a text such as '</think>', or left out"),
        ({"grader_workers": 0}, "grader_workers=0: must be an integer of at least 1"),
        ({"grader_time_limit": math.nan}, "grader_time_limit=nan: must be a finite number above 0"),
        ({"grader_time_limit": math.inf}, "grader_time_limit=inf: must be a finite number above 0"),
    ],
)
def test_an_evaluation_checks_its_grader_before_weights_load(settings, message):
    with pytest.raises(ValueError, match=message):
        EvaluationArguments(model_name_or_path="m", output_dir="o", benchmarks=["b"], **settings)
    assert (
        EvaluationArguments(model_name_or_path="m", output_dir="o", benchmarks=["b"]).recorded()["answer_after"]
        is None
    )
