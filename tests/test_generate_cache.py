"""The bounded cache used as transformers' users use caches: pipelines, copies, modes of autograd, small methods."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
from transformers import pipeline

from experiments.tiny.model import build
from pte_trl.cache import BoundedCache, feed
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from tests.models import gap, left_padded_batch, tiny, with_lora, with_pte

WINDOW = 4
torch.manual_seed(0)
MODELS = {"bare": tiny("llama"), "lora": with_lora(tiny("qwen2")), "pte": with_pte(tiny("qwen3"))}


@pytest.fixture(params=MODELS)
def model(request):
    return MODELS[request.param]


def run(model, cache, ids, start, stop):
    """Logits of the last of the tokens start .. stop, fed one by one; the first 5 are the prompt."""
    spans = [(0, 5)] * (start == 0) + [(at, at + 1) for at in range(max(start, 5), stop)]
    for begin, end in spans:
        logits = model(input_ids=ids[:, begin:end], past_key_values=cache).logits
    return logits[:, -1]


# ---- modes of autograd ----------------------------------------------------------------------------------------------

MODES = {"inference": torch.inference_mode, "no_grad": torch.no_grad, "grad": torch.enable_grad}


@pytest.mark.parametrize(
    ("first", "second", "third"), [o for o in itertools.product(MODES, repeat=3) if len({*o}) > 1]
)
def test_a_cache_may_change_its_mode(first, second, third):
    """Prompt and first evictions in one mode, one token with its eviction in another, the rest in a third."""
    model = MODELS["pte"]
    ids, mask, prompt = left_padded_batch([5], 12)
    with torch.no_grad():
        expected = model(input_ids=ids, **replay_inputs(model, mask, prompt, Schedule(WINDOW))).logits
    cache = BoundedCache(WINDOW)
    for mode, start, stop in ((first, 0, 10), (second, 10, 11), (third, 11, 17)):
        with MODES[mode]():
            logits = run(model, cache, ids, start, stop)
        assert gap(logits.detach(), expected[:, stop - 1]) <= 1e-9
    if third == "grad":
        logits.sum().backward()
        grads = [p.grad for name, p in model.named_parameters() if "pte_up" in name]
        assert all(grad.isfinite().all() and grad.abs().max() > 0 for grad in grads)
        model.zero_grad()


@pytest.mark.parametrize(
    ("first", "second"), [("inference", "no_grad"), ("no_grad", "inference"), ("inference", "grad")]
)
def test_a_prompt_in_another_mode(model, first, second):
    ids, _, _ = left_padded_batch([5], 12)
    cache = BoundedCache(WINDOW)
    with MODES[first]():
        feed(model, cache, ids[:, :5])
    with MODES[second]():
        out = feed(model, cache, ids[:, 5:])
    with torch.no_grad():
        assert gap(out.detach()[:, -1], again(model, ids)) <= 1e-9


def again(model, ids):
    """Logits of the last token, fed one by one through a fresh cache."""
    return run(model, BoundedCache(WINDOW), ids, 0, ids.shape[1])


# ---- copies -----------------------------------------------------------------------------------------------------


def saved(cache):
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "torch.save": saved,
}


@pytest.mark.parametrize("way", COPIES)
@torch.no_grad()
def test_a_copy_goes_on_by_itself(model, way):
    """Copied in the middle of a window; both then go through evictions, with different tokens."""
    ids, _, _ = left_padded_batch([5], 20)
    cache = BoundedCache(WINDOW)
    run(model, cache, ids, 0, 11)
    other = COPIES[way](cache)
    assert (other.get_seq_length(), other.evictions, other.nbytes) == (11, cache.evictions, cache.nbytes)
    elsewhere = torch.cat([ids[:, :11], ids[:, 11:].flip(1)], dim=1)
    for at in range(11, 25):
        mine, its = run(model, cache, ids, at, at + 1), run(model, other, elsewhere, at, at + 1)
    assert gap(mine, again(model, ids)) <= 1e-9
    assert gap(its, again(model, elsewhere)) <= 1e-9


@torch.no_grad()
def test_offloaded_and_fetched_again(model):
    ids, _, _ = left_padded_batch([5], 20)
    cache = BoundedCache(WINDOW)
    for at in range(5, 25):
        logits = run(model, cache, ids, at if at > 5 else 0, at + 1)
        for layer in cache.layers:
            layer.keys, layer.values = layer.keys.clone(), layer.values.clone()  # what a move to another device does
            layer.offload()
            layer.prefetch()
    assert gap(logits, again(model, ids)) <= 1e-9


# ---- small methods ------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_what_transformers_asks_a_cache():
    model, cache = MODELS["pte"], BoundedCache(WINDOW)
    ids, _, _ = left_padded_batch([5, 5], 9)
    assert (len(cache), cache.get_seq_length(), cache.is_initialized, cache.is_compileable) == (0, 0, False, False)
    assert cache.get_mask_sizes(5, 0) == (5, 0) and cache.get_query_offset() == 0 and cache.nbytes == 0
    run(model, cache, ids, 0, 11)
    assert (len(cache), cache.get_seq_length(), cache.get_seq_length(2)) == (3, 11, 11)
    assert cache.is_initialized and not cache.is_compileable and not cache.is_croppable
    assert cache.is_sliding == cache.is_linear == [False] * 3
    assert cache.get_max_length() == cache.get_max_length(1) == -1  # positions grow without end
    # 6 thoughts fed, the first two evicted one by one, and the next token will evict the third.
    assert cache.get_mask_sizes(1, 0) == (5 + 3 + 1, 0) and cache.get_query_offset() == 8
    assert "BoundedCache" in repr(cache)
    cache.crop(0)
    cache.activate_past_recording()  # nothing is recorded, and it cannot be cropped
    with pytest.raises(NotImplementedError, match=r"crop\(-2\): a bounded cache cannot be cropped"):
        cache.crop(-2)
    assert gap(run(model, cache, ids, 11, 14), again(model, ids)) <= 1e-9


@torch.no_grad()
def test_early_initialization(model):
    """For exports, transformers makes the layers before there is a prompt."""
    ids, _, _ = left_padded_batch([5], 12)
    cache = BoundedCache(WINDOW)
    cache.layer(2)
    cache.early_initialization(batch_size=1, num_heads=2, head_dim=8, dtype=torch.float64, device=torch.device("cpu"))
    assert cache.is_initialized and cache.get_seq_length() == 0
    assert gap(run(model, cache, ids, 0, 17), again(model, ids)) <= 1e-9


@torch.no_grad()
def test_rows_of_a_cache_that_generate_has_filled(model):
    """Rows go on by themselves, and are known again; a prompt is shared by repeating it."""
    ids, mask, _ = left_padded_batch([5, 3], 0)
    how = {"max_new_tokens": 9, "do_sample": False}
    cache = BoundedCache(WINDOW)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **how)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([1, 0]))
    longer = torch.cat([out, ids], dim=1)[[1, 1]]
    wider = torch.cat([mask, torch.ones_like(longer[:, 5:])], dim=1)[:2].clone()
    wider[:, :5] = mask[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.generate(input_ids=longer, attention_mask=wider, past_key_values=cache, **how)
    logits = model(input_ids=found, **replay_inputs(model, pad(wider, found), 5, Schedule(WINDOW))).logits
    assert torch.equal(found[:, -9:], logits[:, -10:-1].argmax(-1))


def pad(mask, sequences):
    return torch.cat([mask, mask.new_ones(len(mask), sequences.shape[1] - mask.shape[1])], dim=1)


# ---- pipelines ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_pipeline_takes_one_cache_for_all_prompts(batch_size):
    model, tokenizer = build(seed=0)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    prompts = ["a1b2. Find A.", "a1b2. Find A. And then", "c3. Find C.", "a1b2. Find A."]
    prompts = prompts if batch_size == 1 else [*prompts, "d4. Find D."]  # the last batch is smaller
    how = {"do_sample": False, "max_new_tokens": 12, "batch_size": batch_size}
    with pytest.warns(UserWarning, match="the input does not continue what this BoundedCache holds, so it is reset"):
        found = pipe(prompts, past_key_values=BoundedCache(WINDOW), **how)
    alone = [pipe(prompt, past_key_values=BoundedCache(WINDOW), **how) for prompt in prompts]
    assert found == alone
    full = pipe(prompts[0], **how)
    assert full != alone[0]


def test_a_pipeline_goes_on_with_a_chat():
    model, tokenizer = build(seed=0)
    pipe = pipeline("text-generation", model=model, tokenizer=tokenizer)
    cache = BoundedCache(WINDOW)
    how = {"do_sample": False, "max_new_tokens": 4, "prefix_allowed_tokens_fn": lambda row, ids: [97 - 33, 98 - 33]}
    chat = [{"role": "user", "content": "a1b2. Find A."}]
    chat = pipe(chat, past_key_values=cache, **how)[0]["generated_text"]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        pipe([*chat, {"role": "user", "content": "And B, which is long?"}], past_key_values=cache, **how)
    assert cache.evictions > 20
