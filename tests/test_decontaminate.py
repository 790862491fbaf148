"""Overlap of training and evaluation problems: small cases by hand, and the real sets where they are at hand."""

import json
import os
import random
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from pte_trl.data.decontaminate import (
    SHINGLE,
    Match,
    load_eval_problems,
    normalise,
    overlap,
    remove_overlap,
    shingles,
)
from pte_trl.data.problems import BENCHMARKS, load_problems

EVAL = r"Let $x$ be real with $\left|x-1\right|=\dfrac{3}{4}$. Find the sum of all possible values of $x$."
SAME = r"let x be real with $|x - 1| = \frac34$.  Find the sum of all possible values of $x$"
LONGER = SAME + " Give the answer as an integer m+n where the sum is m/n in lowest terms."
OTHER = "How many ways are there to seat seven people at a round table with two who must not sit together?"


def letters(count, seed=0):
    return "".join(random.Random(seed).choices("abcdefghijklmnopqrstuvwxyz", k=count))


def test_normalise():
    assert normalise(EVAL) == "letxberealwithx1frac34findthesumofallpossiblevaluesofx" == normalise(SAME)
    assert normalise("Größe É 题 7") == "gre7"


def test_an_evaluation_problem_inside_a_longer_one_is_found_and_not_the_reverse():
    assert overlap([OTHER, LONGER, SAME], [EVAL]) == [Match(1, 0, 1.0), Match(2, 0, 1.0)]
    assert overlap([EVAL], [LONGER]) == []


@pytest.mark.parametrize("changed", [0, 1, 5, 37])
def test_share_is_that_of_the_evaluation_problems_shingles(changed):
    text = letters(123)  # 100 shingles, all different
    assert len(shingles(text)) == 100
    train = "9" * changed + text[changed:]  # the first `changed` shingles differ
    ((_, _, share),) = overlap([train], [text], threshold=0.5)
    assert share == (100 - changed) / 100
    assert len(overlap([train], [text], threshold=share)) == 1
    assert changed == 0 or overlap([train], [text], threshold=share + 0.001) == []


def test_every_pair_is_reported_in_order():
    evals = [letters(60, seed) for seed in range(3)]
    train = [evals[2], evals[0] + evals[1], OTHER, evals[2] + "x"]
    assert overlap(train, evals) == [(0, 2, 1.0), (1, 0, 1.0), (1, 1, 1.0), (3, 2, 1.0)]


def test_against_comparing_all_pairs():
    draw = random.Random(0)
    texts = [letters(draw.randint(10, 80), seed) for seed in range(8)]
    mixed = [a[: draw.randint(50, 80)] + b[draw.randint(0, 60) :] for a in texts for b in texts]
    train, evals = mixed[::2], mixed[1::2]
    expected = []
    for i, a in enumerate(train):
        for j, b in enumerate(evals):
            share = len(shingles(a) & shingles(b)) / len(shingles(b))
            if share >= 0.6:
                expected.append((i, j, share))
    assert len(expected) > 20
    assert overlap(train, evals, threshold=0.6) == expected


def test_texts_shorter_than_a_shingle_match_only_their_equal():
    short = "Compute $9^2 + 9$."
    assert len(normalise(short)) < SHINGLE
    assert overlap(["compute 92+9", short + " Then halve it and add a hundred.", "?!", ""], [short, "!"]) == [
        (0, 0, 1.0)
    ]


@pytest.mark.parametrize("threshold", [0, -0.1, 1.1, 90])
def test_threshold_out_of_range(threshold):
    with pytest.raises(ValueError, match=f"threshold={threshold}: must be above 0 and at most 1"):
        overlap([SAME], [EVAL], threshold=threshold)


def rows(*texts):
    return Dataset.from_list([{"id": str(i), "problem": text, "answer": "1"} for i, text in enumerate(texts)])


def test_remove_overlap_drops_all_near_copies_and_counts_them_per_set(capsys):
    dataset = rows(SAME, OTHER, LONGER, letters(80), EVAL)
    cleaned = remove_overlap(dataset, {"one": [letters(50, 1), EVAL], "two": [letters(80)], "three": [letters(90, 2)]})
    assert cleaned.to_list() == [dataset[1]]
    assert capsys.readouterr().out.splitlines() == [
        "decontamination: 3 training problems repeat 1 of 2 in one",
        "decontamination: 1 training problems repeat 1 of 1 in two",
        "decontamination: 0 training problems repeat 0 of 1 in three",
        "decontamination: 4 of 5 training problems removed (share >= 0.9)",
    ]


def test_nothing_to_compare_with_or_nothing_left_is_an_error():
    with pytest.raises(ValueError, match="eval_sets is empty"):
        remove_overlap(rows(SAME), {})
    with pytest.raises(ValueError, match="all 2 training problems overlap with one"):
        remove_overlap(rows(SAME, LONGER), {"one": [EVAL]})


def test_missing_evaluation_sets_are_named_at_once(tmp_path):
    for name in BENCHMARKS[:2]:
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"problem": EVAL, "answer": "2"}) + "\n")
    with pytest.raises(FileNotFoundError) as raised:
        load_eval_problems(tmp_path)
    said = "holds no minerva_math, no amc23, no aime24, no aime25; set data_dir to a folder with a file of each"
    assert f"decontaminate=true: data_dir={str(tmp_path)!r} {said}" in str(raised.value)
    assert "or decontaminate: false" in str(raised.value)
    for name in BENCHMARKS[2:]:
        (tmp_path / f"{name}.csv").write_text(f'problem,answer\n"{EVAL}",2\n')
    assert load_eval_problems(tmp_path) == {name: [EVAL] for name in BENCHMARKS}


def test_a_damaged_evaluation_set_is_not_passed_over(tmp_path):
    for name in BENCHMARKS:
        (tmp_path / f"{name}.jsonl").write_text("{}\n")
    with pytest.raises(ValueError, match="math500"):
        load_eval_problems(tmp_path)


# ---- the real sets

needs_data = pytest.mark.skipif(
    "PTE_DATA_DIR" not in os.environ,
    reason="PTE_DATA_DIR must name a folder with dapo_math_17k.jsonl, the benchmarks and dapo_eval_overlap.json",
)


@pytest.fixture(scope="module")
def real():
    """Training ids and problems, and the same of the benchmarks."""
    folder = Path(os.environ["PTE_DATA_DIR"])
    sets = {name: load_problems(name, data_dir=folder) for name in ("dapo_math_17k", *BENCHMARKS)}
    sets = {name: (list(dataset["id"]), list(dataset["problem"])) for name, dataset in sets.items()}
    return sets.pop("dapo_math_17k"), sets, json.loads((folder / "dapo_eval_overlap.json").read_text())


@needs_data
def test_dapo_overlap_at_90_percent(real):
    (train_ids, train), evals, _ = real
    found = {name: overlap(train, problems) for name, (_, problems) in evals.items()}
    assert {name: len({match.eval_index for match in matches}) for name, matches in found.items()} == {
        "math500": 10,
        "olympiadbench": 45,
        "minerva_math": 0,
        "amc23": 16,
        "aime24": 0,
        "aime25": 0,
    }
    assert {
        name: len({match.train_index for match in found[name]}) for name in ("math500", "olympiadbench", "amc23")
    } == {
        "math500": 12,
        "olympiadbench": 47,
        "amc23": 21,
    }
    removed = {train_ids[match.train_index] for matches in found.values() for match in matches}
    assert len(removed) == 80


@needs_data
def test_dapo_overlap_equals_the_recorded_list(real):
    """The list (one best training problem per evaluation problem, at 70 %) does not count shingles that are in 50
    or more training problems as shared. With that rule added, every share is equal to the two digits recorded."""
    (train_ids, train), evals, recorded = real
    pieces = {problem: shingles(problem) for _, problems in evals.values() for problem in problems}
    wanted = set().union(*pieces.values())
    train_pieces = {key: shingles(text) & wanted for key, text in zip(train_ids, train, strict=True)}
    frequency = Counter(piece for found in train_pieces.values() for piece in found)
    rare = {piece for piece, count in frequency.items() if count < 50}

    compared = 0
    for name, (ids, problems) in evals.items():
        best = {}
        for match in overlap(train, problems, threshold=0.7):
            piece = pieces[problems[match.eval_index]]
            share = len(piece & train_pieces[train_ids[match.train_index]] & rare) / len(piece)
            best[ids[match.eval_index]] = max(share, best.get(ids[match.eval_index], 0))
        best = {key: share for key, share in best.items() if share >= 0.7}
        assert best.keys() == {row[0] for row in recorded[name]}
        for eval_id, share, _, _, _ in recorded[name]:
            assert best[eval_id] == pytest.approx(share, abs=0.00501)
            compared += 1
    assert compared == 99
