"""Word problems in long hand: what is written is right, no problem is in two sets, and the shown model is a folder."""

import json
import re
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from experiments.study import arithmetic
from experiments.study.arithmetic import PEOPLE, THINGS, rows
from experiments.study.names import NAMES

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}<end>{% endfor %}"
TEMPLATE += "{% if add_generation_prompt %}<assistant>{% endif %}"


@pytest.fixture(scope="module")
def sets():
    return rows({"heldout": 50, "train": 200, "shown": 100}, seed=3)


def test_solutions_are_right_step_by_step(sets):
    for row in sets["train"]:
        steps = re.findall(r"(\d+) ([+-]) (\d+) = (\d+)", row["solution"])
        assert len(steps) == 2 * PEOPLE + 1
        for left, sign, right, result in steps:
            assert int(left) + (int(right) if sign == "+" else -int(right)) == int(result) > 0
        # what is asked for is the sum of the two people's last results, wherever they stand
        a, b = re.search(r"have (\w+) and (\w+) together", row["problem"]).groups()
        results = dict(re.findall(r"(\w+): [^.]*= (\d+)\.", row["solution"].split(f" {a} and {b}:")[0]))
        assert len(results) == PEOPLE and a != b
        assert int(results[a]) + int(results[b]) == int(row["answer"])
        assert row["solution"].endswith(rf"\boxed{{{row['answer']}}}.")
        for name, has, gets, loses in re.findall(r"(\w+) has (\d) \w+, gets (\d) and loses (\d)", row["problem"]):
            assert int(results[name]) == int(has) + int(gets) - int(loses)


def test_the_sets_share_no_problem_and_repeat_none(sets):
    problems = [row["problem"] for part in sets.values() for row in part]
    assert len(set(problems)) == len(problems) == 350
    assert rows({"heldout": 50}, seed=3)["heldout"] == sets["heldout"]
    assert rows({"heldout": 50}, seed=4)["heldout"] != sets["heldout"]


def test_a_solution_is_rewarded_and_another_answer_is_not(sets, grader):
    shown = sets["shown"]
    verdicts = grader.grade([row["answer"] for row in shown], [row["solution"] for row in shown])
    assert {verdict.reason for verdict in verdicts} == {"correct"}
    verdicts = grader.grade([str(int(row["answer"]) + 1) for row in shown], [row["solution"] for row in shown])
    assert {verdict.reason for verdict in verdicts} == {"wrong"}


def test_the_shown_model_is_a_folder_that_has_learnt(tmp_path, monkeypatch, sets):
    marks = ["+", "-", "=", ".", ",", ":", "?", "\\", "{", "}", "<", ">", "boxed", "user", "assistant"]
    words = ["has", "gets", "and", "loses", "How", "many", "have", "together", "The", "answer", "is"]
    digits = [str(n) for n in range(40)]
    vocabulary = {w: n for n, w in enumerate(["<pad>", "<end>", *marks, *words, *digits, *NAMES, *THINGS])}
    splitter = Tokenizer(WordLevel(vocabulary, unk_token="<pad>"))
    splitter.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=splitter, eos_token="<end>", pad_token="<pad>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(vocabulary), eos_token_id=1, pad_token_id=0, **sizes)).save_pretrained(
        tmp_path / "model"
    )
    tokenizer.save_pretrained(tmp_path / "model")
    argv = ["arithmetic", "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    monkeypatch.setattr(
        sys, "argv", [*argv, "--steps", "40", "--learning_rate", "1e-2", "--train", "20", "--heldout", "5"]
    )
    arithmetic.main()
    with pytest.raises(SystemExit, match="base is there already"):
        arithmetic.main()
    assert len((tmp_path / "out/train.jsonl").read_text().splitlines()) == 20
    held_out = json.loads((tmp_path / "out/heldout.jsonl").read_text().splitlines()[0])

    def loss(folder) -> float:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        ids = tokenizer(held_out["solution"], return_tensors="pt")["input_ids"]
        with torch.no_grad():
            return model(input_ids=ids, labels=ids).loss.item()

    assert loss(tmp_path / "out/base") < 0.8 * loss(tmp_path / "model")
