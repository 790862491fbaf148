"""Conversations through the bounded cache: a turn longer than the window is what feeding it token by token gives."""

import warnings

import pytest
import torch

from experiments.tiny.model import build
from pte_trl.cache import BoundedCache, feed
from pte_trl.cache.eviction import make_cache
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from tests.models import ALL_SEVEN, VOCAB, gap, left_padded_batch, tiny, with_lora, with_pte

WINDOW, NEW, TURNS = 6, 5, (17, 1, 8)  # tokens of the user's later turns
ARMS = {
    "bare-qwen2": lambda: tiny("qwen2"),
    "bare-mistral": lambda: tiny("mistral"),
    "lora-llama": lambda: with_lora(tiny("llama")),
    "pte-qwen3": lambda: with_pte(tiny("qwen3")),
    "pte-llama-seven": lambda: with_pte(tiny("llama"), target_modules=ALL_SEVEN),
}
GREEDY = {"max_new_tokens": NEW, "do_sample": False}


@pytest.fixture
def model():
    torch.manual_seed(0)
    return with_pte(tiny())


def user(rows: int, turn: int) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, TURNS[turn]), generator=torch.Generator().manual_seed(turn))


def more(ids, mask, new) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.cat([ids, new], dim=1), torch.cat([mask, torch.ones_like(new)], dim=1)


@torch.no_grad()
def replayed(model, ids, mask, prompt, window=WINDOW):
    return model(input_ids=ids, **replay_inputs(model, mask, prompt, Schedule(window))).logits


@torch.no_grad()
def by_token(model, cache, ids, mask):
    """Feeds what the cache has not seen one token at a time, by plain calls of the model."""
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    seen = cache.get_seq_length()
    spans = [(at, at + 1) for at in range(seen, ids.shape[1])] if seen else [(0, ids.shape[1])]
    for start, stop in spans:
        inputs = {"input_ids": ids[:, start:stop], "position_ids": positions[:, start:stop]}
        logits = model(**inputs, attention_mask=mask[:, :stop], past_key_values=cache).logits
    return logits[:, -1]


@pytest.mark.parametrize("arm", ARMS)
def test_a_chat_is_the_reference_s_token_by_token_and_the_replay_s(arm):
    torch.manual_seed(0)
    model = ARMS[arm]()
    ids, mask, prompt = left_padded_batch([5, 3], 0)
    cache, plain = BoundedCache(WINDOW), BoundedCache(WINDOW)
    logged = {"output_logits": True, "return_dict_in_generate": True, "max_new_tokens": NEW}
    for turn in range(len(TURNS) + 1):
        sampling = {"do_sample": True, "top_k": 0} if turn == 1 else {"do_sample": False}
        out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **logged, **sampling)
        logits, said = torch.stack(out.logits, dim=1), out.sequences[:, ids.shape[1] :]
        for step in range(NEW):
            assert gap(logits[:, step], by_token(model, plain, ids, mask)) <= 1e-5  # generate keeps them in float32
            assert turn == 1 or torch.equal(said[:, step], logits[:, step].argmax(-1))
            ids, mask = more(ids, mask, said[:, step : step + 1])
        assert gap(logits, replayed(model, ids, mask, prompt)[:, -NEW - 1 : -1]) <= 1e-5
        assert cache.evictions == plain.evictions == Schedule(WINDOW).evictions(ids.shape[1] - prompt - 1)
        if turn < len(TURNS):
            ids, mask = more(ids, mask, user(2, turn))
    assert cache.evictions > 15


def test_chunks_of_a_turn_change_nothing(model):
    found = []
    for chunk in (None, 1, 4):
        (ids, mask, _), cache = left_padded_batch([9, 3], 0), BoundedCache(WINDOW)
        for turn in range(2):
            inputs = {"input_ids": ids, "attention_mask": mask, "prefill_chunk_size": chunk}
            said = model.generate(**inputs, past_key_values=cache, **GREEDY)[:, ids.shape[1] :]
            ids, mask = more(*more(ids, mask, said), user(2, turn))
        found.append(ids.tolist())
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(("keep", "longest"), [(0, None), (0, 3), (1, None), (8, 4)])
def test_feed_takes_any_number_of_tokens(model, keep, longest):
    ids, mask, prompt = left_padded_batch([9, 4], 30)
    expected, cache = replayed(model, ids, mask, prompt), BoundedCache(WINDOW)
    for start, stop in [(0, prompt), (prompt, prompt + 1), (prompt + 1, prompt + 20), (prompt + 20, 39)]:
        with torch.no_grad():
            part = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop]}
            logits = feed(model, cache, **part, logits_to_keep=keep, longest=longest)
        kept = stop - start if keep == 0 else min(keep, stop - start)
        assert logits.shape[1] == kept
        # Padded places have logits of their own: a replay lets them see themselves.
        assert gap(logits[0], expected[0, stop - kept : stop]) <= 1e-9
        assert gap(logits[1, -1], expected[1, stop - 1]) <= 1e-9
    assert cache.get_seq_length() == 39 and cache.evictions == Schedule(WINDOW).evictions(30)


def test_gradients_flow_through_what_is_fed(model):
    ids, mask, prompt = left_padded_batch([5, 5], 20)
    encoders = [p for name, p in model.named_parameters() if "pte_encoder" in name and p.requires_grad]

    def gradients(logits):
        return torch.autograd.grad(logits[:, -10:].logsumexp(-1).sum(), encoders)

    cache = BoundedCache(WINDOW)
    feed(model, cache, ids[:, :prompt])
    found = gradients(feed(model, cache, ids[:, prompt:], logits_to_keep=0))
    expected = gradients(model(input_ids=ids, **replay_inputs(model, mask, prompt, Schedule(WINDOW))).logits)
    for a, b in zip(found, expected, strict=True):
        assert gap(a, b) <= 1e-8 * max(1.0, b.abs().max().item())


def test_a_prefix_that_was_fed_by_hand_is_gone_on_from(model):
    """transformers' way to share a system prompt: one forward, then generate with a copy of the cache."""
    ids, mask, prompt = left_padded_batch([5, 3], 7)
    cache = BoundedCache(WINDOW)
    cache.expect_prompt(12)  # the question belongs to the prompt, too
    feed(model, cache, ids[:, :prompt], mask[:, :prompt])
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    fresh = model.generate(input_ids=ids, attention_mask=mask, past_key_values=BoundedCache(WINDOW), **GREEDY)
    assert torch.equal(out, fresh)


def test_only_what_is_new_may_be_given_if_it_fits_in_one_forward(model):
    ids, mask, _ = left_padded_batch([5, 3], 0)
    cache, other = BoundedCache(8), BoundedCache(8)
    out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    model.generate(input_ids=ids, attention_mask=mask, past_key_values=other, **GREEDY)
    ids, mask = more(*more(ids, mask, out[:, 5:]), user(2, 1))
    whole = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **GREEDY)
    new = model.generate(input_ids=ids[:, -2:], attention_mask=mask, past_key_values=other, **GREEDY)
    assert torch.equal(whole[:, -NEW:], new[:, -NEW:])
    ids, mask = more(*more(ids, mask, whole[:, -NEW:]), user(2, 0))
    with pytest.raises(ValueError, match=r"input_ids: 18 new tokens take . forwards.*feed all but the last"):
        model.generate(input_ids=ids[:, -18:], attention_mask=mask, past_key_values=other, **GREEDY)


# ---- a cache that is used again -----------------------------------------------------------------------------------


def again(model, cache, ids, mask=None, **kwargs):
    """generate, and whether the cache was reset for it."""
    mask = torch.ones_like(ids) if mask is None else mask
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        out = model.generate(input_ids=ids, attention_mask=mask, past_key_values=cache, **{**GREEDY, **kwargs})
    return out, any("it is reset" in str(warning.message) for warning in caught)


FIRST, _, _ = left_padded_batch([6], 0)
OTHERS = {
    "another prompt": FIRST.flip(1),
    "the same prompt": FIRST,
    "a longer one": torch.cat([FIRST, FIRST, FIRST], dim=1),  # begins with the first prompt, then goes elsewhere
    "a shorter one": FIRST[:, :4],
    "two rows": torch.cat([FIRST, FIRST.flip(1)]),
}


@pytest.mark.parametrize("others", OTHERS)
def test_another_sequence_starts_anew(model, others):
    cache = BoundedCache(WINDOW)
    _, reset = again(model, cache, FIRST)
    assert not reset
    out, reset = again(model, cache, OTHERS[others])
    assert reset
    assert torch.equal(out, again(model, BoundedCache(WINDOW), OTHERS[others])[0])


@pytest.mark.parametrize("padded", [True, False])
def test_other_padding_is_another_sequence(model, padded):
    ids, mask, _ = left_padded_batch([6, 4], 0)
    cache = BoundedCache(WINDOW)
    out, _ = again(model, cache, ids, mask)
    longer, wider = more(*more(ids, mask, out[:, 6:]), user(2, 2))
    assert again(model, cache, longer, wider if padded else torch.ones_like(wider))[1] is not padded


@pytest.mark.parametrize("how", [{"num_return_sequences": 3, "do_sample": True, "top_k": 0}, {"num_beams": 2}])
def test_several_answers_to_one_conversation(model, how):
    ids, mask, prompt = left_padded_batch([6, 4], 0)
    cache = BoundedCache(WINDOW)
    ids, mask = more(*more(ids, mask, again(model, cache, ids, mask)[0][:, prompt:]), user(2, 0))
    logged = {"output_logits": True, "return_dict_in_generate": True}
    out, reset = again(model, cache, ids, mask, **how, **logged)
    assert not reset
    if "num_beams" not in how:
        sequences, wider = more(ids.repeat_interleave(3, 0), mask.repeat_interleave(3, 0), out.sequences[:, -NEW:])
        logits = replayed(model, sequences, wider, prompt)[:, -NEW - 1 : -1]
        assert gap(torch.stack(out.logits, dim=1), logits) <= 1e-5
        assert len(out.sequences.unique(dim=0)) == 6
    else:
        fed = BoundedCache(WINDOW)
        with torch.no_grad():  # the same from a cache that was fed by hand
            feed(model, fed, ids[:, :prompt], mask[:, :prompt])
            feed(model, fed, ids[:, prompt:-1], mask[:, :-1])
        fed.batch_repeat_interleave(2)
        assert torch.equal(again(model, fed, ids, mask, **how)[0], out.sequences)


def test_after_beams_or_an_error_nothing_goes_on(model):
    class Broken:
        def put(self, value):
            if value.numel() == 1:
                raise RuntimeError("full disk")

    cache = BoundedCache(WINDOW)
    out, _ = again(model, cache, FIRST, num_beams=2)
    assert again(model, cache, torch.cat([out, FIRST], dim=1))[1]
    cache = BoundedCache(WINDOW)
    with pytest.raises(RuntimeError, match="full disk"):
        again(model, cache, FIRST, streamer=Broken())
    out, reset = again(model, cache, FIRST)
    assert reset and torch.equal(out, again(model, BoundedCache(WINDOW), FIRST)[0])


def test_what_cannot_go_on_is_refused(model):
    ids, mask, prompt = left_padded_batch([6, 4], 30)
    cache = BoundedCache(WINDOW)
    with torch.no_grad():
        feed(model, cache, ids[:, :prompt], mask[:, :prompt])
    with pytest.raises(ValueError, match=r"holds 6 tokens and the input has 4; to continue, pass the whole sequence"):
        again(model, cache, ids[:, :4])
    with pytest.raises(ValueError, match="holds 2 rows and the input has 1"):
        again(model, cache, ids[:1], mask[:1])
    holes = mask.clone()
    holes[0, prompt + 2] = 0
    for go in (lambda: again(model, cache, ids, holes), lambda: feed(model, cache, ids[:, prompt:], holes)):
        with pytest.raises(ValueError, match="zeros after the prompt of 6 tokens: padding inside of a conversation"):
            go()
    with pytest.raises(ValueError, match="attention_mask of 30 columns for 36 tokens, 6 in the cache and 30 new ones"):
        feed(model, cache, ids[:, prompt:], mask[:, prompt:])
    with pytest.raises(ValueError, match="synced_gpus=True: 30 new tokens take"):
        again(model, cache, ids, mask, synced_gpus=True)
    assert cache.get_seq_length() == prompt


def test_models_whose_masks_would_be_wrong_are_refused(model):
    windowed = tiny("mistral", sliding_window=4)
    with pytest.raises(ValueError, match="full attention, this mistral has sliding_attention; set sliding_window"):
        again(windowed, BoundedCache(WINDOW), FIRST)
    ids, mask, _ = left_padded_batch([6, 4], 0)
    model.config._attn_implementation_internal = "flash_attention_2"  # needs a GPU, but is refused before
    with pytest.raises(ValueError, match="'flash_attention_2': it would see the padding of a prompt"):
        again(model, BoundedCache(WINDOW), ids, mask)


def test_an_error_of_a_plain_forward_names_the_way_out(model):
    cache = BoundedCache(WINDOW)
    with torch.no_grad():
        model(input_ids=FIRST, past_key_values=cache)
        with pytest.raises(
            ValueError, match=r"feed them with pte_trl\.cache\.feed; for another sequence, call cache\.reset"
        ):
            model(input_ids=user(1, 0), past_key_values=cache)


def test_the_end_of_a_prompt_lies_between_two_forwards(model):
    cache = BoundedCache(WINDOW)
    with pytest.raises(ValueError, match=r"expect_prompt\(0\): the cache holds 0 prompt and 0 thought"):
        cache.expect_prompt(0)
    cache.expect_prompt(8)
    with torch.no_grad():
        model(input_ids=FIRST, past_key_values=cache)
        with pytest.raises(ValueError, match="6 tokens fed at once after 6 of the 8 prompt tokens"):
            model(input_ids=FIRST, past_key_values=cache)
        with pytest.raises(ValueError, match=r"expect_prompt\(5\): the cache holds 6 prompt"):
            cache.expect_prompt(5)
        feed(model, cache, torch.cat([FIRST, FIRST], dim=1))
    assert [(layer.prompt, layer.fed) for layer in cache.layers] == [(8, 10)] * 3
    with pytest.raises(ValueError, match=r"expect_prompt\(9\): the cache holds 8 prompt and 10 thought tokens"):
        cache.expect_prompt(9)
    with pytest.raises(ValueError, match="an eviction strategy takes the prompt in one forward"):
        make_cache(model, Schedule(WINDOW), "h2o").expect_prompt(3)


def test_messages_through_a_chat_template():
    """As transformers' users write a chat: all messages, through the template, every time."""
    model, tokenizer = build(seed=0)
    cache, messages = BoundedCache(WINDOW), []
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is reset
        for turn in range(3):
            messages.append({"role": "user", "content": f"a1b{turn}. Find A, and tell me why it is {turn}."})
            inputs = tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
            # Letters only, so that the text is the same tokens again.
            letters = tokenizer.convert_tokens_to_ids(list("xyzw"))
            out = model.generate(
                **inputs,
                past_key_values=cache,
                max_new_tokens=8,
                prefix_allowed_tokens_fn=lambda row, ids, all_of=letters: all_of,
                do_sample=True,
                temperature=1.0,
                top_k=0,
            )
            messages.append({"role": "assistant", "content": tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])})
    assert cache.get_seq_length() == out.shape[1] - 1 and cache.evictions > 20
