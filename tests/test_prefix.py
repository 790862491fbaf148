"""One long run holds every shorter one: the same tokens, and the same records once they are cut and graded again."""

import pytest
import torch

from experiments.tiny.model import build, build_tokenizer
from pte_trl.cache.policy import CachePolicy
from pte_trl.evaluation.prefix import NOT_PREFIXES, main, prefix_records
from pte_trl.evaluation.records import read_records, write_records
from pte_trl.rewards.grader import Grader
from pte_trl.rollouts.rollout import rollout
from tests.models import VOCAB, tiny, with_pte

SHORT, LONG = 25, 50
PROMPTS = [[3, 1, 4, 1, 5, 9, 2], [6, 5, 3], [6, 5, 3], [5, 8, 9, 7, 9], [3, 2]]
POLICIES = {
    "full": CachePolicy(),
    "window": CachePolicy(8),
    "window longer than the short run": CachePolicy(30),
    "budget": CachePolicy(budget=15),
    "h2o": CachePolicy(8, eviction="h2o"),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)  # of the weights, and with them of how long the completions are
    return with_pte(tiny("llama"))


def sampled(model, policy: CachePolicy, length: int, rows: int | None, **options):
    options = {"temperature": 0.9, "top_p": 0.95} | options
    ends = [*range(VOCAB - 2, VOCAB)]  # so that some completions end before either length
    return rollout(
        model,
        PROMPTS,
        policy,
        max_new_tokens=length,
        eos_token_ids=ends,
        pad_token_id=0,
        seeds=list(range(len(PROMPTS))),
        batch_size=rows,
        **options,
    )


@pytest.mark.parametrize("rows", [None, 2], ids=["all at once", "refilled rows"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_shorter_run_is_the_prefix_of_a_longer_one(model, policy, rows):
    short, long = (sampled(model, POLICIES[policy], length, rows) for length in (SHORT, LONG))
    assert short.completion_ids == [ids[:SHORT] for ids in long.completion_ids]
    lengths = sorted(map(len, long.completion_ids))
    assert lengths[0] < SHORT < lengths[-1], "nothing ends early, or nothing is cut"


def test_greedy_too(model):
    short, long = (sampled(model, POLICIES["window"], n, None, temperature=0, top_p=1.0) for n in (SHORT, LONG))
    assert short.completion_ids == [ids[:SHORT] for ids in long.completion_ids]


# ---- records ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture(scope="module")
def grader():
    with Grader(workers=1) as grader:
        yield grader


def record(tokenizer, text: str, **changes) -> dict:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return {
        "problem_id": "p",
        "sample": 0,
        "correct": True,
        "reason": "correct",
        "extracted": "7",
        "completion": tokenizer.decode(ids, skip_special_tokens=True),
        "completion_ids": ids,
        "tokens": len(ids),
        "finish_reason": "stop",
        "evictions": 5,
        "evict_ratio": 0.5,
        "sample_window": 4,
        "contaminated": False,
        "gold": "7",
        "max_new_tokens": 64,
        "eviction": "sliding_window",
    } | changes


def test_what_is_cut_is_graded_again_as_truncated(tokenizer, grader):
    whole = record(tokenizer, r"\boxed{7}, no: \boxed{8}", correct=False, reason="wrong", extracted="8")
    at = {length: prefix_records([whole], length, tokenizer, grader)[0] for length in range(1, whole["tokens"] + 1)}
    closed = next(n for n in at if at[n]["completion"].endswith(r"\boxed{7}"))
    for length, made in at.items():
        assert made["completion_ids"] == whole["completion_ids"][:length] and made["max_new_tokens"] == length
        assert made["completion"] == tokenizer.decode(made["completion_ids"]) and made["tokens"] == length
        assert (made["finish_reason"] == "stop") == (length == whole["tokens"])
        assert made["correct"] == (closed <= length < whole["tokens"]), made["completion"]
        if length < whole["tokens"]:
            assert made["evictions"] == max(0, (length - 1 - 1 - 4) // 2 + 1)
    assert at[whole["tokens"]] == whole | {"max_new_tokens": whole["tokens"]}
    marked = record(tokenizer, r"\boxed{7}, no: \boxed{8}", answer_after="no:")
    assert not prefix_records([marked], closed, tokenizer, grader)[0]["correct"], "it comes before the mark"


def test_what_is_not_cut_stays_as_it_is(tokenizer):
    """The full cache, and a prompt that fills the budget, too; no grader is started for them."""
    same = [record(tokenizer, "1+1"), record(tokenizer, "", finish_reason="no_room", sample_window=0, correct=False)]
    assert prefix_records(same, 20, tokenizer) == [row | {"max_new_tokens": 20} for row in same]
    (cut,) = prefix_records([record(tokenizer, "1+1+1", sample_window=None)], 3, tokenizer)
    assert cut["evictions"] == 0


REFUSED = {
    "length=65: the records have max_new_tokens=64; allowed is at most that": (65, {}),
    "length=0: must be an integer of at least 1": (0, {}),
    "has no completion_ids, it was written by an earlier version": (3, {"completion_ids": None}),
    "reads the tokens of problem p otherwise than they are recorded": (3, {"completion": "another"}),
} | {f"length=3: with eviction='{name}' the cache is divided by": (3, {"eviction": name}) for name in NOT_PREFIXES}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_cut_is_refused(tokenizer, message):
    length, changes = REFUSED[message]
    row = {key: value for key, value in record(tokenizer, "1+1+1+1").items() if changes.get(key, "") is not None}
    with pytest.raises(ValueError) as raised:
        prefix_records([row | {key: value for key, value in changes.items() if value}], length, tokenizer)
    assert message in str(raised.value)


def test_the_command_shows_every_length(tokenizer, tmp_path, capsys):
    build(seed=0)[0].save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    row = record(tokenizer, r"so \boxed{7}", model_name_or_path=str(tmp_path / "model"))
    (tmp_path / "out").mkdir()
    write_records(tmp_path / "out", [row])
    shown = main([str(tmp_path / "out"), "--lengths", "2", str(row["tokens"])])
    assert " at 2 | 1 x 1 " in capsys.readouterr().out
    assert {name.rpartition(" ")[2]: one["pass@1"] for name, one in shown.items()} == {"2": 0, str(row["tokens"]): 1}
    assert read_records(tmp_path / "out") == [row | {"schema": 1}], "the records are left as they are"
    with pytest.raises(SystemExit, match=r"^error: length=65: the records have max_new_tokens=64"):
        main([str(tmp_path / "out"), "--lengths", "65"])
