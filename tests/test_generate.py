"""recipes/generate.py: answers under a budget, streamed, on a tiny untrained model."""

import re

import pytest

from generate import main
from pte_trl.tiny.model import build


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("generate")
    model, tokenizer = build(seed=0)
    tokenizer.save_pretrained(folder)
    model.save_pretrained(folder)
    return str(folder)


def argv(model, **changes) -> list[str]:
    options = {"model_name_or_path": model, "dtype": "float32", "question": "a1b2. Find A.", "budget": 40}
    options |= {"max_new_tokens": 200, "status_every": 50, "temperature": 1.0, "use_cpu": "true"} | changes
    return [str(part) for key, value in options.items() if value is not None for part in (f"--{key}", value)]


def test_the_answer_is_streamed_and_the_cache_stays_within_its_budget(model, capsys):
    (answer,) = main(argv(model, ignore_eos="true"))
    shown = capsys.readouterr()
    assert answer.replace("\n", "") in shown.out.replace("\n", "")
    lines = re.findall(r"\[(\d+) tokens; cache (\d+) tokens, ([\d.]+) MB; (\d+) evictions", shown.err)
    assert [int(tokens) for tokens, *_ in lines] == [50, 100, 150, 200, 200]
    assert all(int(held) <= 40 for _, held, *_ in lines)
    assert [int(evictions) for *_, evictions in lines] == sorted(int(evictions) for *_, evictions in lines)
    assert int(lines[-1][-1]) > 10


def test_a_file_of_questions_is_answered_in_order(model, tmp_path, capsys):
    path = tmp_path / "questions.txt"
    path.write_text("a1b2. Find A.\n\nc1d1. Find C.\n")
    answers = main(argv(model, question=None, file=path, temperature=0, max_new_tokens=12))
    shown = capsys.readouterr().out
    assert len(answers) == 2
    assert shown.index("question: a1b2. Find A.") < shown.index("question: c1d1. Find C.")
    assert answers == main(argv(model, question=None, file=path, temperature=0, max_new_tokens=12))


BAD = [
    ({"file": "/nowhere"}, "exactly one"),
    ({"question": None, "file": "/nowhere"}, "file='/nowhere'"),
    ({"budget": None}, "budget=None, window=None"),
    ({"window": 4}, "budget=40, window=4"),
    ({"model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all"),
    ({"budget": 5}, "budget=5: nothing is left for the thought"),
    ({"max_new_tokens": 0}, "max_new_tokens=0"),
    ({"model_name_or_path": None}, "model_name_or_path: not given"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_stops_before_the_weights_load(model, monkeypatch, changes, message):
    monkeypatch.setattr("generate.load_for_evaluation", lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        main(argv(model, **changes))
