"""The demo's task and model: right answers, splits that cannot overlap, a tokenizer that loses nothing."""

import re

import pytest
import torch

from experiments.tiny.model import build, build_tokenizer
from experiments.tiny.task import DIFFICULTIES, Difficulty, rows, stream
from pte_trl.rewards.grader import Grader

ROWS = [row for difficulty in DIFFICULTIES.values() for row in rows("train", 60, 0, difficulty)]


def test_answers_are_what_the_problem_says():
    for row in ROWS:
        numbers, asked = row["problem"].removesuffix(".").split(". Find ")
        digits = [int(digit) for digit in re.findall(r"[a-z](\d)", numbers)]
        upto = numbers.index(asked.lower()) // 2 + 1
        assert int(row["answer"]) == sum(digits[:upto]) % 10


def test_every_step_of_a_solution_is_right():
    for row in ROWS:
        total, sums = 0, {}
        for name, number, capital, value in re.findall(r"([a-z])(\d)([A-Z])(\d)", row["solution"]):
            total = (total + int(number)) % 10
            sums[capital] = total
            assert (capital, int(value)) == (name.upper(), total)
        capital, value = re.search(r";([A-Z])(\d)=", row["solution"]).groups()
        assert sums[capital] == int(value)


def test_solutions_are_graded_correct_and_others_wrong():
    with Grader() as grader:
        right = grader.grade([row["answer"] for row in ROWS], [row["solution"] for row in ROWS])
        wrong = grader.grade([str((int(row["answer"]) + 1) % 10) for row in ROWS], [row["solution"] for row in ROWS])
    assert all(verdict.correct for verdict in right)
    assert not any(verdict.correct for verdict in wrong)


def test_splits_are_disjoint_and_seeds_repeat():
    train, test = (rows(split, 15, 0, Difficulty((2, 3))) for split in ("train", "test"))
    assert not {row["problem"] for row in train} & {row["problem"] for row in test}
    assert rows("train", 20, 5, DIFFICULTIES["easy"]) == rows("train", 20, 5, DIFFICULTIES["easy"])
    with pytest.raises(ValueError, match="count=3000"):
        rows("train", 3000, 0, Difficulty((2, 3)))
    with pytest.raises(ValueError, match="'valid'"):
        next(stream("valid", 0, DIFFICULTIES["easy"]))


def test_tokenizer_gives_every_text_back():
    tokenizer = build_tokenizer()
    for row in ROWS:
        for text in (row["problem"], row["solution"]):
            assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    chat = [{"role": "system", "content": "Rechne ümläute ∑."}, {"role": "user", "content": "a1b2. Find A."}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>assistant\n") and tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_model_is_small_and_the_seed_decides_its_weights():
    (first, _), (second, _) = build(3), build(3)
    assert sum(p.numel() for p in first.parameters()) < 2e6
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))
