"""Text on a real model whose end needs its beginning, and what is measured at the places asked for."""

import json
import random
import sys

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from experiments.study.names import NAMES, PAIRS, SHORT_ROUNDS, THINGS, draw, draw_mixed, draw_short, question
from experiments.study.recall import build_model, build_tokenizer, countdown
from experiments.study.recall import draw as draw_digits
from pte_trl.cache.schedule import Schedule
from pte_trl.inspect import kl


@pytest.fixture(scope="module")
def tokenizer():
    words = [*NAMES, *THINGS, *map(str, range(1, 25)), *["likes", "Now", "count", "Once", "more", ".", ",", ":"]]
    model = WordLevel({word: n for n, word in enumerate(words)})
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = Whitespace()
    template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, chat_template=template)


def test_what_is_asked_was_told(tokenizer):
    row = draw(tokenizer, random.Random(0))
    words = tokenizer.convert_ids_to_tokens(row["completion_ids"])
    told = {words[4 * n]: words[4 * n + 2] for n in range(PAIRS)}
    assert len(row["asked"]) == PAIRS == len(told)
    for at in row["asked"]:
        assert words[at - 1] == "likes" and told[words[at - 2]] == words[at]
    assert min(row["asked"]) > 4 * PAIRS + 2 * 24
    assert draw(tokenizer, random.Random(1))["completion_ids"] != row["completion_ids"]


def test_mixed_texts_have_all_lengths_and_ask_for_what_they_tell(tokenizer):
    rng = random.Random(0)
    rows = [draw_mixed(tokenizer, rng) for _ in range(200)]
    assert {len(row["asked"]) for row in rows} == set(range(2, 9))
    counts = set()
    for row in rows:
        words = tokenizer.convert_ids_to_tokens(row["completion_ids"])
        told = {words[4 * n]: words[4 * n + 2] for n in range(len(row["asked"]))}
        assert all(told[words[at - 2]] == words[at] for at in row["asked"])
        counts.add(words.index("Once") - words.index(":") - 1)
    assert min(counts) == 6 and max(counts) == 48  # 3 and 24 numbers, and what is between them


def test_short_texts_ask_for_what_they_tell(tokenizer):
    rng = random.Random(0)
    rows = [draw_short(tokenizer, rng) for _ in range(50)]
    pairs = {len(row["asked"]) // SHORT_ROUNDS for row in rows}
    assert pairs == set(range(3, 7)) and not any("count" in row["text"] for row in rows)
    for row in rows:
        words = tokenizer.convert_ids_to_tokens(row["completion_ids"])
        told = {words[4 * n]: words[4 * n + 2] for n in range(len(row["asked"]) // SHORT_ROUNDS)}
        assert all(told[words[at - 2]] == words[at] for at in row["asked"])
        assert all(words.count(name) == 1 + SHORT_ROUNDS for name in told)


def test_a_question_ends_before_its_answer(tokenizer):
    row = draw(tokenizer, random.Random(0))
    asked = question(tokenizer, row, 1)
    assert asked["answer"] in THINGS and asked["thought"].endswith("likes")
    assert asked["thought"].count(asked["answer"]) == 1  # where it was told
    assert asked["problem"].endswith("<assistant>")


def test_kl_at_the_places_asked(tmp_path, monkeypatch):
    """On the recall task's words: whole cache and short window, against the model's own logits."""
    model, words = build_model(0), build_tokenizer()
    model.save_pretrained(tmp_path / "base")
    words.save_pretrained(tmp_path / "base")
    tokens, places = draw_digits(3, 4, countdown(Schedule(8), 4), torch.Generator().manual_seed(0))
    prompt = words.decode(tokens[0, :1])
    rows = [{"prompt": prompt, "completion_ids": row[1:].tolist(), "asked": (places - 1).tolist()} for row in tokens]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    argv = ["kl", "--model", str(tmp_path / "base"), "--completions", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", [*argv, "--windows", "8", "200", "--output", str(tmp_path / "kl.json")])
    kl.main()
    values = json.loads((tmp_path / "kl.json").read_text())["values"]
    assert values["8"]["kl_asked"]["mean"] > 1e-6 > values["200"]["kl_asked"]["mean"] > -1e-6
    assert "kl" in values["8"] and "kl" not in values["200"]  # nothing is evicted there

    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32).eval()
    with torch.no_grad():
        right = (plain(input_ids=tokens).logits[:, places - 1].argmax(-1) == tokens[:, places]).float().mean().item()
    assert values["200"]["right_asked"]["mean"] == pytest.approx(right)
