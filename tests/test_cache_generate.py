"""`model.generate` with the bounded cache, and the cache itself."""

import gc
import weakref

import pytest
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from pte_trl import BoundedCache
from pte_trl.cache.eviction import attention_for, make_cache
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from tests.models import ALL_SEVEN, gap, left_padded_batch, tiny, with_lora, with_pte

WINDOW, NEW = 6, 30
ARMS = {
    "bare": lambda: tiny(),
    "lora": lambda: with_lora(tiny("llama")),
    "pte": lambda: with_pte(tiny()),
    "pte-seven": lambda: with_pte(tiny("llama"), target_modules=ALL_SEVEN),
}


@pytest.fixture(params=ARMS)
def model(request):
    return ARMS[request.param]()


def prompts(lengths):
    ids, mask, _ = left_padded_batch(lengths, 0)
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, inputs, window=WINDOW, cache=None, **kwargs):
    cache = BoundedCache(window) if cache is None else cache
    return model.generate(**inputs, past_key_values=cache, **{"max_new_tokens": NEW, "do_sample": False, **kwargs})


@torch.no_grad()
def replay_logits(model, sequences, inputs, window=WINDOW):
    """Logits that the replay gives for every sampled token of `sequences`."""
    prompt = inputs["input_ids"].shape[1]
    rows = sequences.shape[0] // inputs["input_ids"].shape[0]
    padding = inputs["attention_mask"].repeat_interleave(rows, 0)
    mask = torch.cat([padding, torch.ones_like(sequences[:, prompt:])], dim=1)
    return model(input_ids=sequences, **replay_inputs(model, mask, prompt, Schedule(window))).logits[
        :, prompt - 1 : -1
    ]


@torch.no_grad()
def test_greedy_is_a_greedy_loop_over_replays(model):
    inputs = prompts([5, 3])
    sequences, mask = inputs["input_ids"], inputs["attention_mask"]
    for _ in range(NEW):
        out = model(input_ids=sequences, **replay_inputs(model, mask, 5, Schedule(WINDOW)))
        sequences = torch.cat([sequences, out.logits[:, -1:].argmax(-1)], dim=1)
        mask = torch.cat([mask, mask.new_ones(2, 1)], dim=1)
    cache = BoundedCache(WINDOW)
    assert torch.equal(generate(model, inputs, cache=cache), sequences)
    assert cache.evictions == Schedule(WINDOW).evictions(NEW - 1) == 12
    assert not torch.equal(generate(model, inputs, window=NEW), sequences)


def test_logits_of_sampling_are_the_replay_s(model):
    inputs = prompts([5, 3, 4])
    how = {"do_sample": True, "top_k": 0, "output_logits": True, "return_dict_in_generate": True}
    out = generate(model, inputs, **how)
    assert out.sequences[:, 5:].unique().numel() > 20
    assert gap(torch.stack(out.logits, dim=1), replay_logits(model, out.sequences, inputs)) <= 1e-5  # kept in float32


def test_top_p_samples_from_the_nucleus_of_the_replay(model):
    inputs, top_p, temperature = prompts([5, 3]), 0.5, 0.8
    sequences = generate(model, inputs, do_sample=True, top_k=0, top_p=top_p, temperature=temperature)
    probs = (replay_logits(model, sequences, inputs) / temperature).softmax(-1)
    drawn = sequences[:, 5:, None]
    more_likely = probs.where(probs > probs.gather(-1, drawn), 0).sum(-1)
    assert more_likely.max() <= top_p + 1e-6
    assert more_likely.max() > 0  # not merely greedy


@torch.no_grad()
def test_batch_with_different_finishing_times_is_one_by_one(model):
    lengths = [7, 2, 5]
    inputs = prompts(lengths)
    free = generate(model, inputs)[:, 7:].tolist()
    # an end token that the rows meet at different times
    spread = {t: {row.index(t) if t in row else NEW for row in free} for row in free for t in row}
    eos = max(spread, key=lambda t: len(spread[t]))
    assert len(spread[eos]) > 1
    together = generate(model, inputs, eos_token_id=eos, pad_token_id=0)
    for row, length in enumerate(lengths):
        one = {"input_ids": inputs["input_ids"][row : row + 1, 7 - length :]}
        alone = generate(model, one, eos_token_id=eos, pad_token_id=0)[0, length:].tolist()
        rest = together[row, 7:].tolist()
        assert rest[: len(alone)] == alone
        assert set(rest[len(alone) :]) <= {0}


class StopAfter(StoppingCriteria):
    def __init__(self, length):
        self.length = length

    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((input_ids.shape[0],), input_ids.shape[1] >= self.length)


class Collect(BaseStreamer):
    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


def test_stopping_criteria_and_streamer(model):
    inputs, streamer = prompts([5]), Collect()
    free = generate(model, inputs)
    stopped = generate(model, inputs, stopping_criteria=StoppingCriteriaList([StopAfter(23)]), streamer=streamer)
    assert stopped.tolist() == free[:, :23].tolist()
    assert streamer.tokens == stopped[0].tolist() and streamer.ended


def test_several_sequences_per_prompt(model):
    inputs = prompts([5, 3])
    how = {"do_sample": True, "top_k": 0, "output_logits": True, "return_dict_in_generate": True}
    out = generate(model, inputs, num_return_sequences=3, **how)
    assert out.sequences.shape == (6, 5 + NEW) and out.sequences.unique(dim=0).shape[0] == 6
    assert gap(torch.stack(out.logits, dim=1), replay_logits(model, out.sequences, inputs)) <= 1e-5


def test_beam_search_reorders_keys_and_states(model):
    """The score of every beam is the log-prob that the replay gives its tokens: nothing is mixed between beams."""
    inputs = prompts([5, 3])
    how = {"num_beams": 3, "num_return_sequences": 3, "length_penalty": 0.0, "output_scores": True}
    out = generate(model, inputs, return_dict_in_generate=True, **how)
    logps = replay_logits(model, out.sequences, inputs).log_softmax(-1)
    scores = logps.gather(-1, out.sequences[:, 5:, None]).sum((1, 2))
    assert gap(out.sequences_scores, scores) <= 1e-4
    assert (out.beam_indices.diff() != 0).any()


def test_cache_stays_bounded_and_counts_evictions():
    model, cache, prompt = with_pte(tiny()), BoundedCache(WINDOW), 5
    ids, mask, _ = left_padded_batch([prompt, 3], 40)
    entry = 2 * 3 * 2 * 2 * 8 * 8  # keys and values, layers, batch, kv heads, head_dim, bytes
    memory = 3 * 2 * 6 * 5 * 8  # layers, batch, n_g, r, bytes
    sizes = []
    for start, stop in [(0, prompt)] + [(t, t + 1) for t in range(prompt, 45)]:
        with torch.no_grad():
            model(input_ids=ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=cache)
        fed = stop - prompt
        assert cache.evictions == cache.schedule.evictions(fed)
        kept = fed - cache.schedule.evict * cache.evictions
        assert [layer.keys.shape[2] for layer in cache.layers] == [prompt + kept] * 3
        assert cache.get_seq_length() == stop
        sizes.append(cache.nbytes)
        per_sample = cache.evictions > 0  # S_0 is shared by the batch
        room = prompt + (WINDOW if fed else 0)  # the whole window is there from the first thought on
        assert cache.nbytes == entry * room + (memory if per_sample else memory // 2)
    assert max(sizes) == entry * (prompt + WINDOW) + memory
    assert max(sizes[20:]) == max(sizes[30:])


def test_chunk_across_an_eviction_is_refused(model):
    cache, (ids, mask, prompt) = BoundedCache(WINDOW), left_padded_batch([5, 3], 30)
    with torch.no_grad():
        model(input_ids=ids[:, :prompt], attention_mask=mask[:, :prompt], past_key_values=cache)
        stop = prompt + WINDOW + 1
        with pytest.raises(ValueError, match=r"7 tokens fed at once after 0 thought tokens.*at most 6 fit"):
            model(input_ids=ids[:, prompt:stop], attention_mask=mask[:, :stop], past_key_values=cache)


def test_refused_chunk_leaves_the_cache_as_it_was():
    model, cache, (ids, mask, prompt) = with_pte(tiny()), BoundedCache(WINDOW), left_padded_batch([5], 30)
    with torch.no_grad():
        model(input_ids=ids[:, :prompt], past_key_values=cache)
        with pytest.raises(ValueError):
            model(input_ids=ids[:, prompt : prompt + 7], past_key_values=cache)
        after = model(input_ids=ids[:, prompt : prompt + 6], past_key_values=cache).logits
        expected = model(input_ids=ids, **replay_inputs(model, mask, prompt, Schedule(WINDOW))).logits
    assert gap(after, expected[:, prompt : prompt + 6]) <= 1e-9


def test_crop_is_refused():
    model, cache = tiny(), BoundedCache(WINDOW)
    generate(model, prompts([5]), cache=cache)
    with pytest.raises(NotImplementedError, match="evicted tokens do not come back"):
        cache.crop(1)


def test_reset_makes_the_cache_ready_for_another_batch(model):
    cache = BoundedCache(WINDOW)
    generate(model, prompts([5, 3]), cache=cache)
    assert cache.evictions == 12 and cache.nbytes > 0
    cache.reset()
    assert cache.evictions == 0 and cache.nbytes == 0 and cache.get_seq_length() == 0
    inputs = prompts([4, 6, 6])
    assert torch.equal(generate(model, inputs, cache=cache), generate(model, inputs))


def test_rows_can_be_selected_and_repeated():
    """Continuing with rows 2 and 0 only, or with every row twice, is what those rows would have done."""
    model, (ids, mask, prompt) = with_pte(tiny()), left_padded_batch([5, 3, 4], 20)

    @torch.no_grad()
    def run(rows, change):
        cache = BoundedCache(WINDOW)
        for start, stop in [(0, prompt)] + [(t, t + 1) for t in range(prompt, 20)]:
            if stop == 16:
                change(cache)
            now = rows if stop >= 16 else [0, 1, 2]
            out = model(input_ids=ids[now, start:stop], attention_mask=mask[now, :stop], past_key_values=cache)
        return out.logits

    plain = run([0, 1, 2], lambda cache: None)
    assert gap(run([2, 0], lambda cache: cache.batch_select_indices(torch.tensor([2, 0]))), plain[[2, 0]]) <= 1e-9
    twice = [0, 0, 1, 1, 2, 2]
    assert gap(run(twice, lambda cache: cache.batch_repeat_interleave(2)), plain[twice]) <= 1e-9


@pytest.mark.parametrize("eviction", ["sliding_window", "h2o"])
def test_a_cache_is_gone_with_its_last_name(eviction):
    model = with_pte(tiny("qwen2", torch.float32))
    gc.collect()
    gc.disable()
    try:
        cache = make_cache(model, Schedule(4), eviction)
        with torch.no_grad(), attention_for(model, cache) as extra:
            for ids in ([[1, 2, 3]], [[4]], [[5]], [[6]], [[7]], [[8]]):
                model(input_ids=torch.tensor(ids), past_key_values=cache, use_cache=True, **extra)
        watched = weakref.ref(cache.layers[0])
        assert cache.evictions == 1
        del cache, extra
        assert watched() is None, "a reference cycle keeps it"
    finally:
        gc.enable()
