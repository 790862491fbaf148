"""`model.generate` and a plain loop with the bounded cache: feeding what evictions interrupt, and what is refused.

transformers' decoding loops feed whatever the cache has not seen in one forward. Under a bounded cache, evictions fall
between the tokens of a long user turn, and the cache has to know how long a prompt is that comes in chunks. So every
loop that `generate` can choose is wrapped here. With another cache, or none, the wrapper does nothing.

A chat: the first prompt stays in the cache, every later turn counts as thought. `generate` is given the whole
conversation each time, as for any cache of transformers; what is new of it is fed piece by piece.
"""

import hashlib
import inspect
import warnings
from collections.abc import Callable
from functools import wraps

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import ModelOutput

from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.masks import check_padding_is_seen, config_of
from pte_trl.compat.transformers import BEAM_SEARCH, SAMPLE, wrap_decoding_loops

LOOPS = (SAMPLE, BEAM_SEARCH)  # those a bounded cache can serve
GUESSING = ("assistant_model", "use_mtp", "prompt_lookup_num_tokens", "assistant_early_exit", "is_assistant")


def feed(
    model: nn.Module,
    cache: BoundedCache,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    logits_to_keep: int = 1,
    longest: int | None = None,
) -> Tensor:
    """Feeds any number of tokens after those in the cache, with all evictions due between them.

    Into an empty cache they are the prompt, which stays; later ones are thought tokens, whoever wrote them. The result
    is that of feeding them one by one. Gradients flow unless they are switched off.

    Args:
        model: bare, LoRA or PTE causal language model.
        input_ids: (batch, new tokens).
        attention_mask: (batch, tokens in the cache + new tokens), as for `generate`; may be left out where no prompt
            is padded.
        logits_to_keep: of how many of the last tokens; 0 is all new ones.
        longest: tokens of one forward at most; a longer prompt comes in chunks.

    Returns:
        (batch, kept tokens, vocabulary) logits.

    Raises:
        ValueError: the mask does not fit, or is 0 after the prompt; another number of rows than in the cache.
    """
    cache.configure(config_of(model))
    seen, count = cache.get_seq_length(), input_ids.shape[1]
    if attention_mask is None:
        attention_mask = input_ids.new_ones(len(input_ids), seen + count)
    check_fits(cache, len(input_ids), attention_mask, seen + count)
    if cache.mixed:
        check_padding_is_seen(config_of(model), attention_mask)
    if longest is not None and not seen and count > longest:
        cache.expect_prompt(count)
    positions = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
    at, kept = 0, []
    for length in cache.pieces(count, longest):
        now, at = slice(at, at + length), at + length
        held = cache.mask_columns(length)
        out = model(
            input_ids=input_ids[:, now],
            attention_mask=attention_mask[:, :held],
            position_ids=positions[:, seen + now.start : seen + at],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if logits_to_keep == 0 else max(1, logits_to_keep - (count - at)),
        )
        if logits_to_keep == 0 or count - at < logits_to_keep:
            kept.append(out.logits)
    return torch.cat(kept, dim=1)


def check_fits(cache: BoundedCache, rows: int, mask: Tensor | None, tokens: int) -> None:
    """Refuses input that does not go with what the cache holds.

    Args:
        rows: of the input.
        mask: (rows, tokens), over all tokens, those in the cache first.
        tokens: in the cache and new.

    Raises:
        ValueError: naming what differs.
    """
    first = cache.first
    if first.prompt and first.keys.shape[0] != rows:
        raise ValueError(
            f"past_key_values: this cache holds {first.keys.shape[0]} rows and the input has {rows}; to continue, "
            "pass as many; for another batch, call cache.reset() first or take a fresh cache"
        )
    if mask is None:
        return
    if mask.shape[1] != tokens:
        seen = first.get_seq_length()
        raise ValueError(
            f"attention_mask of {mask.shape[1]} columns for {tokens} tokens, {seen} in the cache and {tokens - seen} "
            "new ones; it must have one for each"
        )
    if not mask[:, -1].all():
        raise ValueError("attention_mask ends with 0: prompts must be padded on the left (padding_side='left')")
    if first.prompt and not mask[:, first.prompt :].all():
        raise ValueError(
            f"attention_mask has zeros after the prompt of {first.prompt} tokens: padding inside of a conversation "
            "would take places of the window; feed conversations of different lengths in batches of their own"
        )


# ---- generate -----------------------------------------------------------------------------------------------------


def refuse(config: GenerationConfig, loop: str) -> None:
    """Refuses what `generate` cannot do, or not exactly, with a bounded cache.

    Raises:
        ValueError: naming the setting, and what is allowed.
    """
    if loop == "generate_batch":
        raise ValueError("cache_implementation='paged': it has a cache of its own and would leave past_key_values out")
    if loop not in LOOPS or config.is_assistant:
        guess = [f"{key}={getattr(config, key)!r}" for key in GUESSING if getattr(config, key, None)]
        raise ValueError(
            f"{', '.join(guess) or GUESSING[0]}: tokens that are guessed have to be taken back, and what a bounded "
            "cache has evicted for them does not come back; allowed are greedy search, sampling and beams without them"
        )
    if config.use_cache is False:
        raise ValueError(
            "use_cache=False: every step would feed all tokens again into past_key_values; allowed is True"
        )
    if config.guidance_scale not in (None, 1):
        raise ValueError(
            f"guidance_scale={config.guidance_scale!r}: its second, unconditional pass has a full cache of its own "
            "that nothing bounds; allowed is 1"
        )


def bounded(name: str, loop: Callable) -> Callable:
    """A decoding loop of `generate` that takes a bounded cache as well."""
    signature = inspect.signature(loop)
    *_, others = signature.parameters  # the name of **kwargs, among which the cache is

    @wraps(loop)
    def run(*args, **kwargs):
        call = signature.bind(*args, **kwargs)
        inputs = call.arguments.get(others, {})
        cache = inputs.get("past_key_values")
        if not isinstance(cache, BoundedCache):
            return loop(*args, **kwargs)
        config = call.arguments["generation_config"]
        refuse(config, name)
        cache.configure(call.arguments["self"].config)
        check_padding_is_seen(call.arguments["self"].config, inputs.get("attention_mask"))
        input_ids = call.arguments["input_ids"]
        mask, whole = inputs.get("attention_mask"), given_whole(input_ids, inputs)
        take_up(call.arguments["self"], cache, input_ids, config, inputs, call.arguments.get("synced_gpus", False))
        first, before = cache.first, (cache.first.history, cache.first.known)
        first.history, first.known = None, -1  # a call that fails leaves nothing to continue from
        out = loop(*args, **kwargs)
        sequences = out.sequences if isinstance(out, ModelOutput) else out
        if not whole:
            first.history, first.known = before
        elif inputs.get("inputs_embeds") is not None:
            first.known = 0
        elif name == SAMPLE and sequences.shape[1] == cache.get_seq_length() + 1:
            first.known = cache.get_seq_length()
            first.history = hashed(sequences[:, :-1], mask).to(first.keys.device)
        return out

    return run


def given_whole(input_ids: Tensor, inputs: dict) -> bool:
    """transformers' own rule: input as long as its mask is the whole sequence, and shorter input is what is new."""
    mask = inputs.get("attention_mask")
    return inputs.get("inputs_embeds") is not None or (mask is not None and mask.shape[1] == input_ids.shape[1])


def take_up(
    model: PreTrainedModel,
    cache: BoundedCache,
    input_ids: Tensor,
    config: GenerationConfig,
    inputs: dict,
    synced: bool,
) -> None:
    """Feeds what of the input cannot be part of the one forward that the loop does.

    Args:
        input_ids: (batch, length) of the whole sequence or of what is new.
        config: `generate`'s own copy. Chunks of the prompt are fed here, so its `prefill_chunk_size` is taken out.
        inputs: what else the model's forward is given.
        synced: whether other processes take part in every forward.
    """
    embeds, mask, whole = inputs.get("inputs_embeds"), inputs.get("attention_mask"), given_whole(input_ids, inputs)
    given = input_ids if embeds is None else embeds
    if whole and embeds is None:
        repeat_rows(cache, input_ids, mask)
    if whole and cache.get_seq_length() and not continues(cache, None if embeds is not None else given, mask, given):
        warnings.warn(
            "past_key_values: the input does not continue what this BoundedCache holds, so it is reset. To continue "
            "a conversation, pass all of its tokens as they were fed and generated",
            stacklevel=2,
        )
        cache.reset()
    seen = cache.get_seq_length()
    total = given.shape[1] if whole else seen + given.shape[1]
    check_fits(cache, len(given), mask, total)
    chunk, config.prefill_chunk_size = config.prefill_chunk_size, None
    if chunk is not None and not seen and total > chunk:
        cache.expect_prompt(total)
    pieces = cache.pieces(total - seen, chunk)
    if len(pieces) > 1 and synced:
        raise ValueError(
            f"synced_gpus=True: {total - seen} new tokens take {len(pieces)} forwards (window="
            f"{cache.schedule.window}), and other processes may need another number; take shorter turns or a wider "
            "window, and no prefill_chunk_size"
        )
    if len(pieces) > 1 and not whole:
        raise ValueError(
            f"input_ids: {total - seen} new tokens take {len(pieces)} forwards (window={cache.schedule.window}), for "
            "which generate needs all tokens of the conversation; pass these, or feed all but the last by "
            "pte_trl.cache.feed"
        )
    for length in pieces[:-1]:
        now, seen = slice(seen, seen + length), seen + length
        part = dict(inputs)
        for key, columns in (("attention_mask", slice(seen)), ("position_ids", now), ("inputs_embeds", now)):
            if part.get(key) is not None:
                part[key] = part[key][:, columns]
        model(**model.prepare_inputs_for_generation(input_ids[:, now], is_first_iteration=True, **part))


def repeat_rows(cache: BoundedCache, input_ids: Tensor, mask: Tensor | None) -> None:
    """Repeats every row of the cache where the input continues each several times (num_return_sequences, beams)."""
    first = cache.first
    rows = 0 if first.history is None else len(first.history)
    if rows and len(input_ids) > rows and len(input_ids) % rows == 0:
        repeats = len(input_ids) // rows
        known = hashed(input_ids[:, : first.known], mask)
        if torch.equal(first.history.cpu().repeat_interleave(repeats, 0), known):
            cache.batch_repeat_interleave(repeats)


def continues(cache: BoundedCache, input_ids: Tensor | None, mask: Tensor | None, given: Tensor) -> bool:
    """Whether a whole sequence begins with what the cache holds.

    Raises:
        ValueError: it is too short for that, and the tokens in the cache are not known, so it may be a continuation.
    """
    first, seen = cache.first, cache.get_seq_length()
    if first.known < 0:
        return False
    if first.history is None or input_ids is None:
        if given.shape[1] <= seen:
            raise ValueError(
                f"past_key_values: this cache holds {seen} tokens and the input has {given.shape[1]}; to continue, "
                "pass the whole sequence; for another one, call cache.reset() first or take a fresh cache"
            )
        return True
    if input_ids.shape[1] <= seen or len(first.history) != len(input_ids):
        return False
    return torch.equal(first.history.cpu(), hashed(input_ids[:, : first.known], mask))


def hashed(input_ids: Tensor, mask: Tensor | None) -> Tensor:
    """(batch, 32) bytes, SHA-256 of every row; padded places count as such. `mask` may be shorter or longer."""
    if mask is not None:
        input_ids = input_ids.clone()
        known = min(mask.shape[1], input_ids.shape[1])
        input_ids[:, :known] = input_ids[:, :known].masked_fill(mask[:, :known] == 0, -1)
    rows = (hashlib.sha256(row.numpy().tobytes()).digest() for row in input_ids.long().cpu())
    return torch.tensor([list(row) for row in rows], dtype=torch.uint8)


wrap_decoding_loops(bounded)
