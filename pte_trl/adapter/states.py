"""The states of many tokens at once: those of a replay in one pass, and those of a segment of a replay."""

from functools import partial

import torch
from torch import Tensor

from pte_trl.adapter.arrival import Call, Given, Probe, Recorder
from pte_trl.adapter.routed import evicted_products
from pte_trl.cache.bounded import BoundedLayer
from pte_trl.replay.plan import ReplayPlan
from pte_trl.replay.segment_layers import SegmentLayer


def of_replay(layer, name: str, hidden: Tensor, call: Call, plan: ReplayPlan) -> Probe | None:
    """Sets S_0 .. S_J of a replay.

    Args:
        layer: the `PteAttention`.
        name: the adapter.
        hidden: (batch, length, d_model), what the attention is called with.

    Returns:
        What to hand to the attention as its cache. A `Recorder` sets the later states in the same forward, when keys
        and values arrive. With a `Given`, or None, they are set already.
    """
    evicts = plan.count > 0 and layer.config[name].encode_evicted
    if evicts and layer.adapts(name, "q_proj") and not layer.keys_follow_state:
        # q_proj runs before keys arrive, and reads S. So the keys are found first, by a forward that ends there.
        queries, first, keys, values = layer.start_and_arriving(name, hidden, call, plan)
        _set(layer, name, plan, queries, first, keys, values)
        return Given(keys, values)

    queries, first = layer.start(name, call)
    layer.in_use.set(layer.pte_encoder[name].state(first))
    if not evicts:
        return None
    if layer.keys_follow_state:
        _set_by_walk(layer, name, hidden, call, plan, queries, first)
        return None
    return Recorder(partial(_set, layer, name, plan, queries, first))  # nothing reads S before keys are there


def _set(layer, name: str, plan: ReplayPlan, queries: Tensor, first: Tensor, keys: Tensor, values: Tensor) -> None:
    """Sets the states after every eviction, from keys and values that do not depend on them."""
    encoder = layer.pte_encoder[name]
    # Latents of every token, though only evicted ones are used: one large product instead of J small ones.
    latents = layer.latents(name, keys, values)
    if encoder.rule.additive and encoder.heads == 1:
        updates = encoder.update_of(queries, evicted_products(*latents, plan))
    else:
        updates = encoder.update(queries, *(plan.pick(x, plan.evicted) for x in latents))
    layer.watch(name, updates)
    layer.in_use.set(encoder.state(first), encoder.state(encoder.advance_all(first, updates)), plan)


def _set_by_walk(layer, name, hidden: Tensor, call: Call, plan: ReplayPlan, queries: Tensor, first: Tensor) -> None:
    """The same where keys or values are adapted: those of later tokens depend on S, and S on those of earlier ones.

    So they are found eviction by eviction, as they were decoded.
    """
    encoder, accumulator, accumulators, updates = layer.pte_encoder[name], first, [], []
    latents = layer.latents(name, *layer.arriving(hidden, call))  # under S_0; right for the tokens decoded under it
    for k in range(plan.count):
        updates.append(encoder.update(queries, *(plan.pick(x, plan.evicted[:, k]) for x in latents)))
        accumulator = encoder.advance(accumulator, updates[-1])
        accumulators.append(accumulator)
        layer.in_use.set(encoder.state(accumulator))
        # The tokens that were decoded under this S get their keys and values anew, before an eviction takes them.
        users = plan.users[:, k]
        theirs = call.at(lambda x, users=users: plan.pick(x.expand(len(users), -1, -1), users))
        new = layer.latents(name, *layer.arriving(plan.pick(hidden, users), theirs))
        latents = [plan.put(old, users, rows) for old, rows in zip(latents, new, strict=True)]
    layer.watch(name, torch.stack(updates, dim=1))
    layer.in_use.set(encoder.state(first), encoder.state(torch.stack(accumulators, dim=1)), plan)


def of_segment(layer, name: str, cached: SegmentLayer, hidden: Tensor, call: Call) -> None:
    """Sets the states of a segment of thoughts, whose tokens may have several."""
    encoder, schedule, before, later = layer.pte_encoder[name], cached.schedule, cached.accumulator, None
    evict, room = schedule.evict, schedule.room(cached.fed)
    old = schedule.evictions_before(cached.fed) == cached.evicted  # whether the first token still has the old state

    def encode(keys: Tensor, values: Tensor, count: int) -> None:
        nonlocal later
        own = count * evict - keys.shape[2]
        if own:
            keys, values = _with_own(layer, keys, values, hidden[:, :own], call.at(lambda x: x[..., :own, :]))
        if count == 1:
            later = layer.encode(name, keys, values, cached.queries, before).unsqueeze(1)
        else:
            later = _encode_runs(layer, name, keys, values, evict, cached)
        cached.accumulator = later[:, -1]

    cached.make_room(hidden.shape[1], encode)
    if hidden.shape[1] <= room:
        layer.in_use.set(encoder.state(cached.accumulator))
        return
    # E tokens in a row have the same state; of the first state there are `room`.
    states, runs = encoder.state(later), -(-room // evict)
    first = encoder.state(before).expand(len(hidden), -1, -1).unsqueeze(1) if old else states[:, :1]
    states = torch.cat([first.expand(-1, runs, -1, -1), states if old else states[:, 1:]], dim=1)
    layer.in_use.set_runs(states, evict, runs * evict - room)


def _with_own(layer, keys: Tensor, values: Tensor, hidden: Tensor, call: Call) -> tuple[Tensor, ...]:
    """Keys and values as the cache holds them, then those of a segment's first tokens, before it holds them.

    No projection of these is adapted (`keys_follow_state`), so no state has to be known.
    """
    new = layer.arriving(hidden, call)
    return tuple(torch.cat(pair, dim=2) for pair in zip((keys, values), new, strict=True))


def _encode_runs(layer, name: str, keys: Tensor, values: Tensor, run: int, cached: BoundedLayer) -> Tensor:
    """(batch, J, …, r) accumulators after J evictions of `run` tokens; keys: (batch, kv heads, J run, …)."""
    encoder = layer.pte_encoder[name]
    latents = (x.unflatten(1, (-1, run)) for x in layer.latents(name, keys, values))
    updates = encoder.update(cached.queries, *latents)
    if torch.is_grad_enabled():
        layer.watch(name, updates)
    return encoder.advance_all(cached.accumulator, updates)
