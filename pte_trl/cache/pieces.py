"""How many tokens go through a model in one forward, so that the result is that of one by one.

Evictions are one limit (`BoundedCache.pieces`). Recurrent layers add two: some models begin every forward of several
tokens from an empty state, and no model of transformers drops the padding of a forward of one token.
"""

from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.layers import STATES, RecurrentLayer, copied, held, hold
from pte_trl.cache.masks import config_of

_KNOWN: "WeakKeyDictionary[nn.Module, bool]" = WeakKeyDictionary()


def forwards(
    model: nn.Module, cache: BoundedCache, tokens: int, mask: Tensor | None, longest: int | None = None
) -> list[int]:
    """The next `tokens` tokens as lengths of forwards.

    Args:
        cache: with the layers of `model`.
        mask: (batch, tokens in the cache + new tokens), 0 where padded.
        longest: tokens of one forward at most.

    Raises:
        ValueError: the prompt has to come in one forward, or in longer ones.
    """
    pieces = cache.pieces(tokens, longest)
    if not any(isinstance(layer, RecurrentLayer) for layer in cache.layers):
        return pieces
    seen, first = cache.get_seq_length(), cache.first
    prompt = 0 if not first.in_prompt() else (first.expected or tokens) - first.prompt
    if any(length > 1 for length in (pieces if seen else pieces[1:])) and not takes_up_states(model):
        if prompt and (seen or pieces[0] < min(prompt, tokens)):
            raise ValueError(
                f"a prompt in several forwards (longest or prefill_chunk_size={longest}): recurrent layers of "
                f"{config_of(model).model_type} begin each from an empty state; allowed is None, one forward"
            )
        pieces = pieces[: 1 if prompt else 0]
        pieces += [1] * (tokens - sum(pieces))
    at = seen
    for length in pieces:
        if length == 1 and at < seen + prompt and mask is not None and not mask[:, at].all():
            raise ValueError(
                f"a padded prompt token by token (longest or prefill_chunk_size={longest}): recurrent layers of "
                f"{config_of(model).model_type} would take padding for tokens; allowed are 2 or more, or None"
            )
        at += length
    return pieces


def takes_up_states(model: nn.Module) -> bool:
    """Whether the recurrent layers begin a forward of several tokens from the states of the tokens before.

    Two forwards from two different states tell, once for every model; what is compared is the new state of the first
    layer that has one, whose input is the same in both.
    """
    if model not in _KNOWN:
        _KNOWN[model] = _states_matter(model)
    return _KNOWN[model]


@torch.no_grad()
def _states_matter(model: nn.Module) -> bool:
    device = next(model.parameters()).device
    tokens = torch.ones(1, 2, dtype=torch.long, device=device)
    cache = BoundedCache(8, config=config_of(model))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        model(input_ids=tokens, past_key_values=cache, use_cache=True)
        found = []
        layers = cache.layers
        for other in (False, True):
            cache.layers = [copied(layer) for layer in layers]
            for layer in cache.layers:
                states = {name: x for name, x in held(layer).items() if name.startswith(STATES[1])}
                if other:
                    hold(layer, {name: x + 1 for name, x in states.items()})
            model(input_ids=tokens, past_key_values=cache, use_cache=True)
            states = (x for layer in cache.layers for name, x in held(layer).items() if name.startswith(STATES[1]))
            found.append(next(states, None))
    return found[0] is None or not torch.equal(*found)
