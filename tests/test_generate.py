"""recipes/generate.py: answers under a budget, streamed, on a tiny untrained model."""

import re
import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from experiments.tiny.model import build
from pte_trl import BoundedCache
from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.evaluation.config import EvaluationArguments
from pte_trl.evaluation.generate import main
from pte_trl.evaluation.runner import Evaluation
from pte_trl.models.generation_config import eos_token_ids, neutral_generation_config
from pte_trl.models.tokens import load_tokenizer
from pte_trl.rollouts.rollout import rollout
from pte_trl.rollouts.sampling import Sampling
from pte_trl.rollouts.streaming import stream
from tests.models import tiny, with_pte


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


# ---- sampling -------------------------------------------------------------------------------------------------------

# What a checkpoint's generation config can hold. None of it is asked for by a recipe.
HOSTILE = {
    "repetition_penalty": 1.3,
    "temperature": 0.1,
    "top_k": 2,
    "top_p": 0.3,
    "no_repeat_ngram_size": 2,
    "suppress_tokens": list(range(100, 300)),
    "begin_suppress_tokens": [9],
    "bad_words_ids": [[8]],
    "forced_eos_token_id": 3,
    "min_new_tokens": 4,
    "max_length": 20,
    "num_beams": 2,
    "do_sample": True,
    "typical_p": 0.5,
}


@pytest.fixture(scope="module")
def hostile(model, tmp_path_factory):
    """The same weights with a generation config that says everything."""
    folder = tmp_path_factory.mktemp("hostile")
    other = AutoModelForCausalLM.from_pretrained(model)
    other.generation_config = GenerationConfig(**HOSTILE, eos_token_id=other.config.eos_token_id, pad_token_id=5)
    other.save_pretrained(folder)
    for file in Path(model).iterdir():
        if file.name.startswith(("tokenizer", "chat_template")):
            shutil.copy(file, folder)
    return str(folder)


@pytest.mark.parametrize("options", [{"temperature": 0.8, "top_p": 0.9, "seed": 7}, {"temperature": 0}])
def test_the_text_is_the_evaluation_s_whatever_the_checkpoint_says(model, hostile, options, tmp_path):
    options = {"max_new_tokens": 40, "budget": 41} | options
    (written,) = main(argv(hostile, **options))
    assert written == main(argv(model, **options))[0]
    problems = Dataset.from_list([{"id": "0", "problem": "a1b2. Find A.", "answer": "1", "gold_note": ""}])
    problems = problems.add_column("contaminated", [False])
    args = EvaluationArguments(
        model_name_or_path=model, dtype="float32", output_dir=str(tmp_path), benchmarks=["sums"], **options
    )
    loaded = AutoModelForCausalLM.from_pretrained(hostile).eval()
    tokenizer = load_tokenizer(args)
    evaluation = Evaluation("sums", problems, tokenizer, args, Accelerator(cpu=True), grader=None)
    evaluation.model = loaded
    (sample,) = evaluation.samples()
    (made,) = evaluation._generate([type(sample)(0, 0, options.get("seed", 0), sample.window)])
    assert made.text == written


@pytest.mark.parametrize("top_p", [1.0, 0.6])
def test_the_stream_is_the_rollout(top_p):
    """The same tokens as the engine's, for a PTE model, up to and with the end token."""
    model, prompt = with_pte(tiny("llama")), [3, 1, 4, 1, 5]
    options = {"temperature": 0.9, "top_p": top_p, "max_new_tokens": 30}
    free = rollout(model, [prompt], CachePolicy(6), eos_token_ids=[], pad_token_id=0, seeds=[11], **options)
    (free,) = free.completion_ids
    for ends in ((), (free[20], 0)):
        sampling = Sampling(eos_token_ids=ends, pad_token_id=0, **options)
        cache = BoundedCache(6)
        found = list(stream(model, prompt, cache, sampling, seed=11))
        assert found == (free if not ends else free[: free.index(free[20]) + 1])
        assert cache.get_seq_length() == len(prompt) + len(found) - 1


def test_a_neutral_generation_config_leaves_plain_sampling(hostile):
    model = AutoModelForCausalLM.from_pretrained(hostile)
    ids, how = torch.tensor([[5, 6, 7]]), {"max_new_tokens": 12, "output_scores": True, "output_logits": True}
    how |= {"do_sample": True, "return_dict_in_generate": True}
    out = model.generate(ids, **how, num_beams=1)
    assert not torch.equal(torch.stack(out.scores), torch.stack(out.logits))
    model.generation_config = neutral_generation_config(model)
    out = model.generate(ids, **how)
    assert torch.equal(torch.stack(out.scores), torch.stack(out.logits))
    tokenizer = AutoTokenizer.from_pretrained(hostile)
    assert eos_token_ids(model, tokenizer) == [tokenizer.eos_token_id]
    model.generation_config.eos_token_id = [3, tokenizer.eos_token_id]
    assert eos_token_ids(model, tokenizer) == [3, tokenizer.eos_token_id]


def test_weights_that_are_not_finite_end_it(model, tmp_path, capsys):
    """As in training and evaluation; without a check it would write a text of the first token."""
    spoilt = AutoModelForCausalLM.from_pretrained(model)
    spoilt.model.layers[-1].mlp.up_proj.weight.data[0, 0] = float("nan")
    folder = shutil.copytree(model, tmp_path / "spoilt")
    spoilt.save_pretrained(folder)
    with pytest.raises(SystemExit, match=r"^error: question 'a1b2\. Find A\.': logits are not finite \(nan\)"):
        main(argv(folder))


# ---- settings -----------------------------------------------------------------------------------------------------


def test_a_flag_takes_the_place_of_the_recipe_s_window(model, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("window: 8\nmax_new_tokens: 4\n")
    seen, prompt_ids = [], []
    monkeypatch.setattr(
        "pte_trl.evaluation.generate.answer",
        lambda model, tokenizer, ids, schedule, args: (prompt_ids.append(ids), seen.append(schedule)),
    )
    main(argv(model, config=recipe, max_new_tokens=None))
    (asked,) = prompt_ids
    assert seen == [CachePolicy(budget=40).schedule(len(asked))] == [Schedule(40 - len(asked))]  # as in training
    main(argv(model, config=recipe, budget=None, max_new_tokens=None))
    assert seen[1:] == [Schedule(8)]
    recipe.write_text("window: 8\nbudget: 64\n")
    with pytest.raises(SystemExit, match="window=8, budget=64: give exactly one of the two"):
        main(argv(model, config=recipe, budget=None))


def test_a_line_of_the_file_is_a_question(model, tmp_path, monkeypatch):
    path = tmp_path / "questions.txt"
    path.write_bytes("\ufeffWhat is\u2028one?\r\n \nAnd\x0ctwo?".encode())
    asked = []
    monkeypatch.setattr("pte_trl.evaluation.generate.answer", lambda *args: asked.append(args[2]))
    main(argv(model, question=None, file=path, window=8, budget=None))
    tokenizer = AutoTokenizer.from_pretrained(model)
    for ids, question in zip(asked, ("What is\u2028one?", "And\x0ctwo?"), strict=True):
        assert f"user\n{question}<" in tokenizer.decode(ids)


FILES = {
    "empty.txt": b"",
    "blank.txt": b" \n\t\n",
    "latin.txt": b"fine\nna\xefve\n",
    "utf16.txt": "What?".encode("utf-16"),
    "empty.yaml": b"",
    "list.yaml": b"- 1\n",
    "twice.yaml": b"dtype: float32\ndtype: bfloat16\n",
    "broken.yaml": b"a: [1\n",
    "latin.yaml": b"a: na\xefve\n",
}


BAD = [
    ({"file": "/nowhere"}, "exactly one"),
    ({"question": None, "file": "/nowhere"}, "file='/nowhere': no such file"),
    ({"question": None, "file": "/"}, "file='/': Is a directory"),
    ({"question": None, "file": "@empty.txt"}, "empty.txt': no question in it"),
    ({"question": None, "file": "@blank.txt"}, "blank.txt': no question in it"),
    ({"question": None, "file": "@latin.txt"}, "latin.txt': line 2 is not UTF-8 text"),
    ({"question": None, "file": "@utf16.txt"}, "utf16.txt': line 1 is not UTF-8 text"),
    ({"question": " "}, "question=' ': no question in it"),
    ({"question": "a\udcff"}, "is not text"),
    ({"budget": None}, "window=None, budget=None"),
    ({"window": 4}, "window=4, budget=40"),
    ({"budget": 1}, "budget=1: must be an integer of at least 2"),
    ({"budget": None, "window": 0}, "window=0: must be one integer of at least 1"),
    ({"budget": 8}, r"budget=8: nothing is left for the thought.* has 1\d tokens; allowed is 1\d or more"),
    ({"evict_ratio": 0}, "evict_ratio=0.0"),
    ({"max_new_tokens": 0}, "max_new_tokens=0: must be an integer of at least 1"),
    ({"status_every": 0}, "status_every=0: must be an integer of at least 1"),
    ({"temperature": -0.5}, "temperature=-0.5: must be a finite number of at least 0"),
    ({"temperature": "nan"}, "temperature=nan: must be a finite number of at least 0"),
    ({"temperature": "inf"}, "temperature=inf: must be a finite number of at least 0"),
    ({"top_p": 0}, "top_p=0.0: must be a number above 0 and at most 1"),
    ({"top_p": 1.5}, "top_p=1.5: must be a number above 0 and at most 1"),
    ({"top_p": "nan"}, "top_p=nan: must be a number above 0 and at most 1"),
    ({"seed": -1}, "seed=-1: must be an integer from 0 to 4294967295"),
    ({"seed": 2**32}, "seed=4294967296: must be an integer from 0 to 4294967295"),
    ({"recipe": "/nowhere.yaml"}, "recipe /nowhere.yaml: no such file"),
    ({"recipe": "@empty.yaml"}, "empty.yaml: must hold `key: value` lines, found NoneType"),
    ({"recipe": "@list.yaml"}, "list.yaml: must hold `key: value` lines, found list"),
    ({"recipe": "@twice.yaml"}, "twice.yaml: dtype: occurs twice in the recipe"),
    ({"recipe": "@broken.yaml"}, "broken.yaml: not plain YAML"),
    ({"recipe": "@latin.yaml"}, "latin.yaml: not plain YAML in UTF-8"),
    ({"model_name_or_path": "/nowhere/at/all"}, "/nowhere/at/all"),
    ({"model_name_or_path": None}, "model_name_or_path: not given"),
]


@pytest.mark.parametrize(("changes", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input_stops_before_the_weights_load(model, monkeypatch, tmp_path, changes, message):
    for key, value in changes.items():
        if str(value).startswith("@"):
            path = tmp_path / value[1:]
            path.write_bytes(FILES[path.name])
            changes = changes | {key: path}
    monkeypatch.setattr(
        "pte_trl.evaluation.generate.load_for_evaluation", lambda *_: pytest.fail("weights were loaded")
    )
    with pytest.raises(SystemExit, match=f"(?s)error: .*{message}"):
        main(argv(model, **changes))
