"""The benchmarks as they are: counts, hashes, golds that verify, and those that are read too narrowly."""

import os
from pathlib import Path

import pytest

from pte_trl.data.problems import load_problems
from pte_trl.evaluation.benchmarks import (
    TESTED,
    contaminated,
    content_hash,
    gold_notes,
    load_benchmark,
    number_of,
    problem_key,
)
from pte_trl.rewards.judging import judge

# Gold, a completion's answer, and the verdict that makes the gold doubtful.
DOUBTFUL = {
    ("math500", "test/number_theory/864.json"): (r"52_8", "52", False),
    ("math500", "test/number_theory/46.json"): (r"40_9", "40", False),
    ("math500", "test/number_theory/516.json"): (r"2516_8", "2516", False),
    ("math500", "test/number_theory/847.json"): (r"4210_{5}", "4210", False),
    ("math500", "test/number_theory/1257.json"): (r"204_5", "204", False),
    ("math500", "test/number_theory/368.json"): (r"4343_6", "4343", False),
}
# Golds that math-verify alone reads up to a point, as a unit or not at all.
READ_WHOLE = [
    (r"\frac{dM}{dt}=\frac{10^{5} L_{\odot}}{M^{6}} M^{6}", r"\frac{dM}{dt}=10^5 L_{\odot}", True),
    (r"\frac{1}{\sqrt{2}}c", r"\frac{c}{\sqrt 2}", True),
    (r"m_{p} c^{2}\left(\gamma^{2}-1\right) \sin ^{2} \theta", r"m_p c^2 \sin^2\theta (\gamma^2-1)", True),
    ("SRAC=LRAC", r"\text{SRAC}=\text{LRAC}", True),
    (r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}", "2", False),
    (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{E_1+2E_2}{3}", True),
    ("E_{1},E_{2}", "E_2, E_1", True),
    (r"\angle B E A_{1}=90,\angle A E B_{1}=90", "90, 90", True),
    ("6m", "6", False),
    (r"\frac{37}{4} m", r"\frac{37}{4}", False),
    ("16,3,1,1", "16,3,1", False),
    ("-2,-2", "-2", False),
    ("4.2", r"4.2\%", True),
]


@pytest.mark.parametrize("name", DOUBTFUL, ids="-".join)
def test_a_doubtful_gold_is_read_as_its_note_says(grader, name):
    gold, answer, verdict = DOUBTFUL[name]
    assert grader.grade([gold], [rf"\boxed{{{answer}}}"])[0].correct == verdict
    assert grader.grade([gold], [rf"\boxed{{{gold}}}"])[0].correct  # the very same text always counts


@pytest.mark.parametrize(("gold", "answer", "verdict"), READ_WHOLE)
def test_a_gold_is_read_whole(gold, answer, verdict):
    assert judge(gold, gold)[0] == "correct"
    assert (judge(gold, answer)[0] == "correct") == verdict


def test_every_note_is_shown_above():
    noted = {(benchmark, number) for benchmark, notes in gold_notes().items() for number in notes}
    assert noted == set(DOUBTFUL)


def test_a_problem_is_known_by_its_words_whatever_the_spacing():
    assert problem_key("Find $x$ if  \\left(x+1\\right)=2.") == problem_key("find $x$ if (x+1)=2")
    assert problem_key("Find $x$ if (x+1)=2.") != problem_key("Find $x$ if (x+1)=3.")
    assert number_of("minerva/27") == number_of("minerva_math/27") == number_of("27") == "27"


def test_an_unknown_set_is_flagged_as_such_and_a_known_problem_found(tmp_path, capsys):
    (tmp_path / "mine.jsonl").write_text('{"problem": "p", "answer": "1"}\n{"problem": "q", "answer": "2"}\n')
    problems = load_benchmark("mine", tmp_path, limit=1)
    assert "2 problems, sha256 " in (said := capsys.readouterr().out) and "not a benchmark the project knows" in said
    assert problems.to_list() == [
        {"id": "mine/0", "problem": "p", "answer": "1", "contaminated": False, "gold_note": None}
    ]


needs_data = pytest.mark.skipif("PTE_DATA_DIR" not in os.environ, reason="PTE_DATA_DIR must name a folder of them")


@needs_data
@pytest.mark.parametrize("name", TESTED)
def test_the_real_benchmark(grader, name):
    folder = Path(os.environ["PTE_DATA_DIR"])
    problems = load_benchmark(name, folder)
    assert content_hash(load_problems(name, data_dir=folder)).startswith(TESTED[name].sha256)
    assert grader.gold_faults(problems["answer"]) == {}, "a gold that does not equal itself"
    assert sum(problems["contaminated"]) == len(contaminated()[name])
    noted = [row["id"] for row in problems if row["gold_note"]]
    notes = gold_notes().get(name, {})
    assert len(noted) == len(notes) and all(i in notes or number_of(i) in notes for i in noted)
