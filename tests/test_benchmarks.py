"""The benchmarks as they are: counts, hashes, golds that verify, and those that math-verify reads wrongly."""

import os
from pathlib import Path

import pytest

from pte_trl.data import load_problems
from pte_trl.evaluation.benchmarks import (
    BENCHMARKS,
    contaminated,
    content_hash,
    gold_notes,
    load_benchmark,
    number_of,
    problem_key,
)

GAMMA = r"m_{p} c^{2}\left(\gamma^{2}-1\right) \sin ^{2} \theta"
# Gold, a completion's answer, and the verdict that makes the gold doubtful.
DOUBTFUL = {
    ("minerva_math", "27"): (
        r"\frac{dM}{dt}=\frac{10^{5} L_{\odot}}{M^{6}} M^{6}",
        r"\frac{dM}{dt}=10^5 L_{\odot}",
        0,
    ),
    ("minerva_math", "137"): (r"\frac{1}{\sqrt{2}}c", r"\frac{c}{\sqrt 2}", False),
    ("minerva_math", "245"): ("MR=SRMC", r"\text{MR}=\text{SRMC}", False),
    ("minerva_math", "250"): ("SRAC=LRAC", r"\text{SRAC}=\text{LRAC}", False),
    ("minerva_math", "251"): ("SRMC=LRMC", r"\text{SRMC}=\text{LRMC}", False),
    ("minerva_math", "261"): (r"\hbar \omega(v+1 / 2)-\frac{E_{0}^{2} e^{2}}{2 m \omega^{2}}", "2", True),
    ("minerva_math", "269"): ("E_{1},E_{2}", "E_2, E_1", False),
    ("minerva_math", "138"): (GAMMA, r"m_p c^2 \sin^2\theta (\gamma^2-1)", False),
    ("minerva_math", "268"): (r"\frac{1}{3} E_{1}+\frac{2}{3} E_{2}", r"\frac{E_1+2E_2}{3}", False),
    ("olympiadbench", "1760"): (r"\angle B E A_{1}=90,\angle A E B_{1}=90", "90, 90", False),
    ("olympiadbench", "2185"): ("6m", "6", True),
    ("olympiadbench", "2356"): ("16,3,1,1", "16,3,1", True),
    ("olympiadbench", "2532"): ("-2,-2", "-2", True),
    ("olympiadbench", "2592"): ("4.2", r"4.2\%", False),
}


@pytest.mark.parametrize("name", DOUBTFUL, ids="-".join)
def test_a_doubtful_gold_is_read_as_its_note_says(grader, name):
    gold, answer, verdict = DOUBTFUL[name]
    assert grader.grade([gold], [rf"\boxed{{{answer}}}"])[0].correct == verdict
    assert grader.grade([gold], [rf"\boxed{{{gold}}}"])[0].correct  # the very same text always counts


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
@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_real_benchmark(grader, name):
    folder = Path(os.environ["PTE_DATA_DIR"])
    problems = load_benchmark(name, folder)
    assert content_hash(load_problems(name, data_dir=folder)).startswith(BENCHMARKS[name].sha256)
    assert grader.gold_faults(problems["answer"]) == {}, "a gold that does not equal itself"
    assert sum(problems["contaminated"]) == len(contaminated()[name])
    notes = {number_of(row["id"]) for row in problems if row["gold_note"]}
    assert notes == set(gold_notes().get(name, {}))
