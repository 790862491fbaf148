"""The register machine: what is written is right, what is asked for was evicted, and nothing visible tells it."""

import json
import random
import re
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.registers import shown, texts
from experiments.registers.task import ASKED, LONGEST, SMOLLM2, TINY, WORDS, Machine, Program, compact, in_words
from experiments.study.registers import SMOLLM2_WINDOW, WINDOWS
from experiments.tiny.model import build, build_tokenizer
from experiments.tiny.task import rows
from pte_trl.cache.schedule import Schedule
from pte_trl.training.distill.completions import read_completions
from tests.forked import python
from tests.test_study import run

LAYERS = 4  # of the tiny model
SIZES = st.builds(
    Machine,
    chains=st.integers(3, 4),
    length=st.integers(2, 4),
    depth=st.just(1),
    after=st.integers(1, 10),
    write=st.sampled_from([compact, in_words]),
)
MACHINES = st.one_of(SIZES, st.sampled_from([TINY, SMOLLM2]))
SEEDS = st.integers(0, 2**32)


def interpret(problem: str) -> tuple[dict[str, int], list[str]]:
    """Values and asked registers of a problem in either form, read from its text alone."""
    body, asked = re.fullmatch(r"(?:Only last digits count\. )?(.*)\. (?:Find|What is) (.*)[.?]", problem).groups()
    values, last = {}, 0
    for name, operation, number in re.findall(r"([a-z])(?: = (?:[a-z] )?)?([+*]?) ?(\d)", body):
        last = {"": int(number), "+": last + int(number), "*": last * int(number)}[operation] % 10
        values[name] = last
    return values, [name.lower() for name in re.split(r" ?\+ ?", asked)]


@given(MACHINES, SEEDS)
def test_the_answer_is_that_of_the_text(machine, seed):
    row = machine.draw(random.Random(seed))
    values, asked = interpret(row["problem"])
    assert "".join(values) == "abcdefghijklmnopqrstuvwxyz"[: machine.registers]
    assert len(set(asked)) == ASKED
    assert int(row["answer"]) == sum(values[name] for name in asked) % 10
    assert row["solution"].count(r"\boxed{" + row["answer"] + "}") == 1


@given(SEEDS)
def test_every_step_of_a_solution_is_right(seed):
    program = TINY.program(random.Random(seed))
    problem, solution = compact(program)
    values, asked = interpret(problem)
    assert re.findall(r"([A-Z])(\d)", solution.split(";")[0]) == [(n.upper(), str(v)) for n, v in values.items()]
    end = re.fullmatch(r"(\w)\1(\d)\+(\w)\3(\d)=(\d+)\+(\w)\6(\d)=(\d+)", solution.split(";")[1]).groups()
    assert [end[0], end[2], end[5]] == [name.upper() for name in asked]
    x, y, z = (values[name] for name in asked)
    assert [int(end[place]) for place in (1, 3, 4, 6, 7)] == [x, y, x + y, z, x + y + z]

    problem, solution = in_words(program)
    steps = re.findall(r"(\d) ([+*]) (\d) = (\d+)(?:, so (\d))?", solution)
    assert len(steps) == sum(operation != "=" for operation, _ in program.lines) + 2
    for left, operation, right, result, digit in steps:
        exact = int(left) + int(right) if operation == "+" else int(left) * int(right)
        assert int(result) == exact and digit == (str(exact % 10) if exact > 9 else "")


def changed(program: Program, register: int, number: int) -> Program:
    """The program with another number at the beginning of a register's chain."""
    start = max(at for at in range(register + 1) if program.lines[at][0] == "=")
    return replace(program, lines=(*program.lines[:start], ("=", number), *program.lines[start + 1 :]))


@given(MACHINES, SEEDS)
def test_nothing_that_follows_a_chain_tells_its_values(machine, seed):
    """Beside the rest of the thought each of the ten values of a register is possible, and gives another answer."""
    program = machine.program(random.Random(seed))
    behind = machine.chains * machine.length  # the first register that comes after all that can be asked
    for register in program.asked:
        others = [changed(program, register, number) for number in range(10)]
        assert {other.values[register] for other in others} == set(range(10))
        assert {other.answer for other in others} == set(range(10))
        assert len({tuple(other.results[behind:]) for other in others}) == 1
        for rest in set(program.asked) - {register}:
            assert len({other.values[rest] for other in others}) == 1
        # it takes operations to work it out again, as many as the machine says
        begins = max(at for at in range(register + 1) if program.lines[at][0] == "=")
        assert register - begins >= machine.depth and register < behind


TOKENIZER = build_tokenizer(WORDS)


@given(SEEDS)
def test_what_is_asked_has_left_every_window(seed):
    row = TINY.draw(random.Random(seed))
    tokens = TOKENIZER.tokenize(row["solution"])
    assert TOKENIZER.decode(TOKENIZER(row["solution"])["input_ids"]) == row["solution"]
    question, last = tokens.index(";"), 2 * TINY.chains * TINY.length - 1  # a line and a value each
    assert question == 2 * TINY.registers and len(tokens) < LONGEST
    for window in WINDOWS[:-1]:
        assert Schedule(int(window)).first_visible(question) > last
    # and at the smallest no path of attention leads back, through any of the layers
    reach = question
    for _ in range(LAYERS):
        reach = Schedule(int(WINDOWS[0])).first_visible(reach)
    assert reach > last


@given(SEEDS)
def test_what_is_asked_has_left_the_window_in_words(seed):
    """Whatever the tokenizer, if it has a token or more for every word, sign and digit."""
    solution = SMOLLM2.draw(random.Random(seed))["solution"]
    lines = re.split(r"(?<=\.) ", solution)
    assert lines[SMOLLM2.registers].count("+") == 4  # the question
    behind = " ".join(lines[SMOLLM2.chains * SMOLLM2.length : SMOLLM2.registers])
    assert len(re.findall(r"[a-z]+|\d|[^\w\s]", behind)) >= int(SMOLLM2_WINDOW)


def test_every_answer_is_as_likely():
    for machine in (TINY, SMOLLM2):
        counts = Counter(row["answer"] for row in rows("test", 1000, 1, machine))
        assert set(counts) == set("0123456789") and max(abs(count - 100) for count in counts.values()) < 40


def test_the_sets_share_no_problem():
    train, test = ({row["problem"] for row in rows(split, 300, 0, TINY)} for split in ("train", "test"))
    assert len(train) == len(test) == 300 and not train & test
    found = shown.sets({"heldout": 50, "train": 60, "shown": 70}, seed=0)
    problems = [row["problem"] for part in found.values() for row in part]
    assert [len(part) for part in found.values()] == [50, 60, 70] and len(set(problems)) == 180


def test_a_solution_is_rewarded_and_another_answer_is_not(grader):
    some = [row for machine in (TINY, SMOLLM2) for row in rows("train", 20, 3, machine)]
    right = grader.grade([row["answer"] for row in some], [row["solution"] for row in some])
    wrong = grader.grade([str((int(row["answer"]) + 1) % 10) for row in some], [row["solution"] for row in some])
    assert {verdict.reason for verdict in right} == {"correct"} and {v.reason for v in wrong} == {"wrong"}


@pytest.mark.parametrize("change", [{"chains": 2}, {"depth": 0}, {"depth": 4}, {"after": 0}, {"after": 15}])
def test_sizes_that_make_no_problem_are_refused(change):
    with pytest.raises(ValueError, match="at least 3 chains, 1 <= depth < length"):
        replace(TINY, **change)


@pytest.mark.thorough  # nine seconds; tests/test_arithmetic.py has the fine-tuning itself
def test_a_model_is_shown_solutions(tmp_path, monkeypatch):
    model, tokenizer = build(0, WORDS)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    argv = ["shown", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out"), "--steps", "1"]
    monkeypatch.setattr(sys, "argv", [*argv, "--train", "4", "--heldout", "2"])
    shown.main()
    assert (tmp_path / "out/base/config.json").exists()
    assert [len((tmp_path / f"out/{name}.jsonl").read_text().splitlines()) for name in ("train", "heldout")] == [4, 2]
    with pytest.raises(SystemExit, match="base is there already"):
        shown.main()


@given(SEEDS)
def test_what_is_told_again_is_what_was_worked_out(seed):
    row = texts.told_again(TOKENIZER, random.Random(seed))
    worked, *rounds = row["text"].split(" Again:")
    values = dict(re.findall(r"([a-z]) =(?:[^.]*\D)? ?(\d)\.", worked))
    assert len(values) == texts.SHORT.registers and len(rounds) == texts.ROUNDS
    recalled = [TOKENIZER.decode(row["completion_ids"][at])[-1] for at in row["asked"]]
    told = [re.findall(r"([a-z]) = (\d)\.", part) for part in rounds]
    assert all(sorted(part) == sorted(values.items()) for part in told)
    assert recalled == [value for part in told for _, value in part]


@given(SEEDS)
def test_a_written_solution_knows_where_it_recalls(seed):
    drawn = SMOLLM2.draw(random.Random(seed))
    row = texts.solved(TOKENIZER, drawn)
    values, asked = interpret(drawn["problem"])
    assert row["prompt"][0]["content"] == drawn["problem"] and row["completion_ids"][-1] == TOKENIZER.eos_token_id
    assert TOKENIZER.decode(row["completion_ids"][:-1]) == drawn["solution"]
    assert [int(TOKENIZER.decode(row["completion_ids"][at])) for at in row["asked"]] == [
        values[name] for name in asked
    ]


def test_texts_are_written_beside_the_problems(tmp_path, monkeypatch):
    TOKENIZER.save_pretrained(tmp_path / "base")
    for name in ("train", "heldout"):
        problems = rows({"train": "train", "heldout": "test"}[name], 5, 1, SMOLLM2)
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    argv = ["texts", "--base", str(tmp_path / "base"), "--output", str(tmp_path), "--short", "7", "--heldout", "3"]
    monkeypatch.setattr(sys, "argv", argv)
    texts.main()
    for name, count in (("short", 7), ("heldout_completions", 3), ("train_completions", 5)):
        assert len(read_completions(str(tmp_path / f"{name}.jsonl"), TOKENIZER)) == count


def test_the_base_is_trained_and_kept(tmp_path):
    command = [python(), "-m", "experiments.registers.pretrain", "--output", "registers"]
    sizes = ["--steps", "2", "--batch-size", "2", "--rows", "8", "--test-problems", "2"]
    out = run(tmp_path, *command, *sizes)
    assert "on 2 held-out problems" in out
    folder = Path(tmp_path, "registers")
    assert len((folder / "train.jsonl").read_text().splitlines()) == 8
    assert json.loads((folder / "base/config.json").read_text())["num_hidden_layers"] == LAYERS
    assert "nothing to do" in run(tmp_path, *command)
