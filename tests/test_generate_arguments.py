"""Every argument of `generate` and every field of `GenerationConfig` with the bounded cache: it works, is refused, or
does nothing; a new one of an upgrade fails here until it is classed.

What works is run under evictions, and the logits of every token are those of the replay. Beams, and what must not
change the tokens, are run under a window so wide that nothing leaves, against transformers' own `DynamicCache`.
"""

import inspect

import pytest
import torch
import torch.distributed as dist
from transformers import CompileConfig, DynamicCache, GenerationConfig, GenerationMixin
from transformers.generation import LogitsProcessor, LogitsProcessorList, WatermarkingConfig
from transformers.generation.utils import GENERATION_MODES_MAPPING

from experiments.tiny.model import build_tokenizer
from pte_trl import BoundedCache
from pte_trl.cache.generate import LOOPS
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs
from tests.models import FAMILIES, gap, left_padded_batch, tiny, with_lora, with_pte
from tests.test_cache_generate import Collect, StopAfter

NARROW, WIDE, NEW = 3, 64, 7
TOKENIZER = build_tokenizer()
TOKENIZER.bos_token = TOKENIZER.eos_token  # token healing wants one
SHAPE = {"num_hidden_layers": 2, "vocab_size": len(TOKENIZER)}
torch.manual_seed(0)
MODELS = {
    "bare": tiny("llama", **SHAPE),
    "lora": with_lora(tiny("qwen2", **SHAPE)),
    "pte": with_pte(tiny("qwen3", **SHAPE)),
}
IDS, MASK, PROMPT = left_padded_batch([5, 3], 0)
# Nothing is taken from a checkpoint's config here but the padding token.
BASE = {"input_ids": IDS, "attention_mask": MASK, "max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
TEXT = dict(TOKENIZER("Tell me: b", return_tensors="pt"))  # tokens b0 .. b9 begin with its last
TEXT = {key: TEXT[key] for key in ("input_ids", "attention_mask")}
SAMPLE, BEAMS = {"do_sample": True, "top_k": 0}, {"num_beams": 2}


class Prefer(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + 9 * (torch.arange(scores.shape[1]) == 7)


def own_loop(model, *args, **kwargs):
    return type(model)._sample(model, *args, **kwargs)


def embeds(model) -> torch.Tensor:
    return model.get_input_embeddings()(IDS).detach()


# Field or argument -> what generate is called with; a function is called with the model.
WORKS = {
    "max_length": {"max_length": PROMPT + 4, "max_new_tokens": None},
    "max_new_tokens": {"max_new_tokens": 4},
    "min_length": {"min_length": PROMPT + 6, "eos_token_id": list(range(300))},
    "min_new_tokens": {"min_new_tokens": 6, "eos_token_id": list(range(300))},
    "early_stopping": {"early_stopping": True, "eos_token_id": list(range(300)), **BEAMS},
    "max_time": {"max_time": 1e-9},
    "stop_strings": {"stop_strings": list("0123456789"), "tokenizer": TOKENIZER},
    "do_sample": SAMPLE,
    "num_beams": BEAMS,
    "temperature": {"temperature": 0.2, **SAMPLE},
    "top_k": {"do_sample": True, "top_k": 2},
    "top_p": {"top_p": 0.2, **SAMPLE},
    "min_p": {"min_p": 0.5, **SAMPLE},
    "top_h": {"top_h": 0.2, **SAMPLE},
    "typical_p": {"typical_p": 0.2, **SAMPLE},
    "epsilon_cutoff": {"epsilon_cutoff": 0.1, **SAMPLE},
    "eta_cutoff": {"eta_cutoff": 0.3, **SAMPLE},
    "repetition_penalty": {"repetition_penalty": 0.1},
    "encoder_repetition_penalty": {"encoder_repetition_penalty": 9.0},
    "length_penalty": {"length_penalty": -9.0, "eos_token_id": list(range(300)), **BEAMS},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 1},
    "bad_words_ids": {"bad_words_ids": [[i] for i in range(400)]},
    "renormalize_logits": {"renormalize_logits": True, "output_scores": True, "return_dict_in_generate": True},
    "forced_bos_token_id": {"forced_bos_token_id": 2, "input_ids": IDS[:, -1:], "attention_mask": MASK[:, -1:]},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay_length_penalty": {"exponential_decay_length_penalty": (2, 9.0), "eos_token_id": 5},
    "suppress_tokens": {"suppress_tokens": list(range(400))},
    "begin_suppress_tokens": {"begin_suppress_tokens": list(range(400))},
    "sequence_bias": {"sequence_bias": [[[7], 9.0]]},
    "token_healing": {"token_healing": True, "tokenizer": TOKENIZER, **TEXT},
    "watermarking_config": {"watermarking_config": WatermarkingConfig(bias=20.0)},
    "num_return_sequences": {"num_return_sequences": 3, **SAMPLE},
    # not padded: transformers' own eager attention gives NaN for padding in float64
    "output_attentions": {"output_attentions": True, "return_dict_in_generate": True, "attention_mask": MASK**0},
    "output_hidden_states": {"output_hidden_states": True, "return_dict_in_generate": True},
    "output_scores": {"output_scores": True, "return_dict_in_generate": True},
    "output_logits": {"output_logits": True, "return_dict_in_generate": True},
    "return_dict_in_generate": {"return_dict_in_generate": True},
    "eos_token_id": {"eos_token_id": list(range(300))},
    "pad_token_id": {"pad_token_id": 9, "eos_token_id": list(range(300))},
    "bos_token_id": {"bos_token_id": 9, "input_ids": None, "attention_mask": None},
    "encoder_no_repeat_ngram_size": {"encoder_no_repeat_ngram_size": 1, "input_ids": torch.arange(400)[None]}
    | {"attention_mask": torch.ones(1, 400, dtype=torch.long)},
    "prefill_chunk_size": {"prefill_chunk_size": 2},
    # arguments
    "inputs": {"inputs": IDS.flip(1), "input_ids": None, "attention_mask": MASK.new_ones(2, 5)},
    "generation_config": {"generation_config": GenerationConfig(max_new_tokens=5)},
    "logits_processor": {"logits_processor": LogitsProcessorList([Prefer()])},
    "stopping_criteria": {"stopping_criteria": [StopAfter(9)]},
    "prefix_allowed_tokens_fn": {"prefix_allowed_tokens_fn": lambda row, ids: [3, 4, 5 + row]},
    "synced_gpus": {"synced_gpus": True, "eos_token_id": list(range(300))},
    "streamer": {"input_ids": IDS[:1], "attention_mask": MASK[:1]},
    "custom_generate": {"custom_generate": own_loop, "max_new_tokens": 4},
    # of the model's forward
    "input_ids": {"input_ids": IDS.flip(1)},
    "attention_mask": {"attention_mask": torch.tensor([[0, 0, 0, 1, 1]] * 2)},
    "position_ids": {"position_ids": torch.arange(5).repeat(2, 1) * 2},
    "inputs_embeds": lambda model: {"inputs_embeds": embeds(model).flip(1), "input_ids": None},
    "logits_to_keep": {"logits_to_keep": 2},
}
NO_EFFECT = {
    "remove_invalid_values": {"remove_invalid_values": True},  # there are none
    "diversity_penalty": {"diversity_penalty": 0.5},  # of groups of beams
    "low_memory": {"low_memory": True},  # of contrastive search
    "decoder_start_token_id": {"decoder_start_token_id": 3},  # of encoder-decoders
    "num_assistant_tokens": {"num_assistant_tokens": 3},  # these of assisted decoding
    "num_assistant_tokens_schedule": {"num_assistant_tokens_schedule": "heuristic"},
    "assistant_confidence_threshold": {"assistant_confidence_threshold": 0.1},
    "max_matching_ngram_size": {"max_matching_ngram_size": 3},
    "assistant_lookbehind": {"assistant_lookbehind": 3},
    "target_lookbehind": {"target_lookbehind": 3},
    "assistant_ensemble_weight": {"assistant_ensemble_weight": 0.5},
    "speculation_type": {"speculation_type": "dflash"},
    "max_cache_len": {"max_cache_len": 9},  # of a cache that generate makes
    "cache_config": {"cache_config": {"backend": "quanto"}},
    "compile_config": {"compile_config": CompileConfig()},  # a bounded cache is not compiled
    "disable_compile": {"disable_compile": True},
    "continuous_batching_config": {},  # of generate_batch
    "negative_prompt_ids": {"negative_prompt_ids": IDS},  # of guidance_scale
    "negative_prompt_attention_mask": {"negative_prompt_attention_mask": MASK},
    "labels": {"labels": IDS},  # generate does not pass them on
    "use_cache": {"use_cache": True},
    "cache_implementation": {"cache_implementation": None},
    "guidance_scale": {"guidance_scale": 1},
    "_commit_hash": {},
    "_from_model_config": {},
    "transformers_version": {},
}
GUESS = "tokens that are guessed have to be taken back, and what a bounded cache has evicted"
HUB = "requires `trust_remote_code=True`"  # transformers' own words: the mode is a repository on the hub
REFUSED = {
    "use_cache": ({"use_cache": False}, "use_cache=False: every step would feed all tokens again"),
    "cache_implementation": ({"cache_implementation": "static"}, "Passing both `cache_implementation`"),
    "cache_implementation paged": (
        {"cache_implementation": "paged"},
        "cache_implementation='paged': it has a cache of its own",
    ),
    "guidance_scale": ({"guidance_scale": 1.5}, "guidance_scale=1.5: .* a full cache of its own"),
    "use_mtp": ({"use_mtp": True}, f"use_mtp=True: {GUESS}"),
    "assistant_model": (lambda model: {"assistant_model": tiny("llama", **SHAPE)}, f"assistant_model: {GUESS}"),
    "prompt_lookup_num_tokens": ({"prompt_lookup_num_tokens": 3}, f"prompt_lookup_num_tokens=3: {GUESS}"),
    "assistant_early_exit": ({"assistant_early_exit": 1}, f"assistant_early_exit=1: {GUESS}"),
    "is_assistant": ({"is_assistant": True}, f"is_assistant=True: {GUESS}"),
    "penalty_alpha": ({"penalty_alpha": 0.5, "top_k": 4}, HUB),
    "dola_layers": ({"dola_layers": "high"}, HUB),
    "num_beam_groups": ({"num_beam_groups": 2, "num_beams": 4}, HUB),
    "constraints": ({"constraints": [3]}, HUB),
    "force_words_ids": ({"force_words_ids": [[3]]}, HUB),
    "right padding": ({"attention_mask": MASK.flip(1)}, r"ends with 0: prompts must be padded on the left"),
    "short mask": ({"attention_mask": MASK.new_ones(2, 6)}, "6 columns for 5 tokens, 0 in the cache and 5 new ones"),
    "4d mask": ({"attention_mask": MASK.new_ones(2, 1, 5, 5)}, "must be 2D"),
}


def call(model, cache, kwargs, seed: int = 0):
    """(sequences, the whole output) of one generate."""
    torch.manual_seed(seed)
    kwargs = {key: value for key, value in (BASE | kwargs).items() if value is not None}
    if "generation_config" in kwargs:
        kwargs = {key: kwargs[key] for key in ("input_ids", "attention_mask", "generation_config")}
    out = model.generate(**kwargs, past_key_values=cache)
    return (out, None) if isinstance(out, torch.Tensor) else (out.sequences, out)


def resolve(kwargs, model) -> dict:
    return kwargs(model) if callable(kwargs) else dict(kwargs)


def test_every_argument_and_field_is_classed():
    classed = {*WORKS, *NO_EFFECT, *REFUSED}
    there = set(vars(GenerationConfig())) | set(inspect.signature(GenerationMixin.generate).parameters)
    for _, model_class in FAMILIES.values():
        there |= set(inspect.signature(model_class.forward).parameters)
    assert there - classed - {"self", "kwargs", "past_key_values"} == set()
    beside = {"cache_implementation paged", "right padding", "short mask", "4d mask"}
    assert classed - there == beside, "no longer an argument"


def test_every_loop_of_generate_is_wrapped():
    """`pte_trl.compat.transformers.wrap_decoding_loops` relies on these private names."""
    for name in {loop for loop in GENERATION_MODES_MAPPING.values() if "/" not in loop} | {"generate_batch"}:
        wrapped = getattr(GenerationMixin, name)
        assert wrapped.__module__ == wrapped.__wrapped__.__module__, "functools.wraps keeps what generate looks at"
        assert inspect.signature(wrapped) == inspect.signature(wrapped.__wrapped__)
    assert set(LOOPS) <= set(GENERATION_MODES_MAPPING.values())
    for _, model_class in FAMILIES.values():
        assert model_class._sample is GenerationMixin._sample, "a loop of its own would not be wrapped"


@pytest.fixture
def process_group(tmp_path):
    """A world of one process, for `synced_gpus`."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


ARMS = [(arm, key) for number, key in enumerate(WORKS) for arm in [list(MODELS)[number % 3]]]
ARMS += [(arm, key) for key in ("do_sample", "num_beams", "prefill_chunk_size", "inputs_embeds") for arm in MODELS]


SAME_TOKENS = ("prefill_chunk_size", "custom_generate", "logits_to_keep", "streamer", "synced_gpus", "inputs_embeds")


@pytest.mark.parametrize(("arm", "key"), sorted(set(ARMS)))
def test_it_works(arm, key, request):
    model = MODELS[arm]
    kwargs = resolve(WORKS[key], model)
    if key == "synced_gpus":
        request.getfixturevalue("process_group")
    if key == "output_attentions":
        request.addfinalizer(lambda: model.set_attn_implementation("sdpa"))
        model.set_attn_implementation("eager")
    if key in SAME_TOKENS or "num_beams" in kwargs:
        plain = {k: v for k, v in kwargs.items() if k not in ("prefill_chunk_size", "streamer")}
        expected, _ = call(model, DynamicCache(), plain)
        if key == "streamer":
            kwargs["streamer"] = Collect()
        assert call(model, BoundedCache(WIDE), kwargs)[0].tolist() == expected.tolist()
        if key == "streamer":
            streamer = kwargs.pop("streamer")
            assert streamer.tokens == expected[0].tolist() and streamer.ended
    if "num_beams" in kwargs:  # under evictions: test_beam_search_reorders_keys_and_states
        assert key == "num_beams" or expected.tolist() != call(model, DynamicCache(), BEAMS)[0].tolist()
        return
    sequences, out = call(model, BoundedCache(NARROW), logging(kwargs))
    same_as_replay(key, model, kwargs, sequences, torch.stack(out.logits, dim=1))
    if key == "output_attentions":  # of every step and layer, over what is kept
        assert [step[0].shape[-1] for step in out.attentions] == [PROMPT + n for n in (0, 1, 2, 3, 3, 3, 3)]
    elif key == "renormalize_logits":
        assert gap(torch.stack(out.scores).exp().sum(-1), torch.ones(NEW, 2)) <= 1e-5
    elif key.startswith("output_"):
        assert getattr(out, key.removeprefix("output_")) is not None
    elif key not in (*SAME_TOKENS, "return_dict_in_generate"):
        plain = SAMPLE if kwargs.get("do_sample") and key != "do_sample" else TEXT if key == "token_healing" else {}
        assert sequences.tolist() != call(model, BoundedCache(NARROW), plain)[0].tolist(), "it has changed nothing"


def logging(kwargs: dict) -> dict:
    """With the logits in the output."""
    wanted = {"output_logits": True, "return_dict_in_generate": True}
    if "generation_config" in kwargs:
        return kwargs | {"generation_config": GenerationConfig(max_new_tokens=5, **wanted)}
    return kwargs | wanted


@torch.no_grad()
def same_as_replay(key, model, kwargs, sequences, logits) -> None:
    prompt = sequences.shape[1] - logits.shape[1]
    given = kwargs.get("attention_mask", MASK)
    if key == "inputs_embeds":
        sequences, prompt = torch.cat([IDS.flip(1), sequences], dim=1), PROMPT
    mask = sequences.new_ones(sequences.shape)
    if given is not None:
        mask[:, : given.shape[1]] = given.repeat_interleave(len(mask) // len(given), 0)
    inputs = replay_inputs(model, mask, prompt, Schedule(NARROW))
    if key == "position_ids":
        first = kwargs["position_ids"]
        inputs["position_ids"] = torch.cat([first, first[:, -1:] + torch.arange(1, NEW + 1)], dim=1)
    expected = model(input_ids=sequences, **inputs).logits[:, prompt - 1 : -1]
    assert gap(logits, expected) <= 1e-5  # generate keeps them in float32


@pytest.fixture(scope="module")
def plain():
    return call(MODELS["pte"], BoundedCache(NARROW), {})[0]


@pytest.mark.parametrize("key", [key for key, kwargs in NO_EFFECT.items() if kwargs])
def test_it_does_nothing(key, plain):
    assert torch.equal(call(MODELS["pte"], BoundedCache(NARROW), NO_EFFECT[key])[0], plain)


@pytest.mark.parametrize(("key", "arm"), [(key, list(MODELS)[n % 3]) for n, key in enumerate(REFUSED)])
def test_it_is_refused(key, arm):
    kwargs, message = REFUSED[key]
    cache, model = BoundedCache(WIDE), MODELS[arm]
    with pytest.raises(ValueError, match=message):
        call(model, cache, resolve(kwargs, model))
    assert cache.get_seq_length() == 0
