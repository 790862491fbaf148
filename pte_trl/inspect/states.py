"""What a trained adapter does with what it evicts: one completion, its states, and how far it is from the full cache.

    python -m pte_trl.inspect ADAPTER
    python -m pte_trl.inspect ADAPTER --model outputs/smollm2-135m --window 64 --prompt "..." --output outputs/inspect

Writes inspect.json, states.png, tokens.png and distance.png, into ADAPTER/inspect by default.
S' of an eviction is a sum over its tokens of one outer product each, so a token's contribution is exact, and so is its
share, its length along S' over |S'|: the shares of an eviction add up to 1, and one that works against it is
negative. Times |S'| / |S| it is how far the token moved S.
"""

import torch
from peft import PeftModel
from torch import Tensor

from pte_trl.adapter.arrival import Call
from pte_trl.adapter.attention import PteAttention
from pte_trl.adapter.model import active_layers
from pte_trl.cache.schedule import Schedule
from pte_trl.inspect.kl import kl_per_token
from pte_trl.replay.plan import ReplayPlan, replay_inputs
from pte_trl.rollouts.prompts import left_pad


class Watch:
    """Keeps the latents and the start that a replay's encoder computes: everything else follows from them."""

    def __init__(self, model: PeftModel):
        self.layers = active_layers(model)
        self.latents: list[tuple[Tensor, Tensor]] = []
        self.starts: list[tuple[Tensor, Tensor]] = []

    def __enter__(self) -> "Watch":
        self.handles = [layer.register_forward_pre_hook(self._see, with_kwargs=True) for layer in self.layers]
        return self

    def __exit__(self, *error) -> None:
        for handle in self.handles:
            handle.remove()

    def _see(self, layer: PteAttention, args: tuple, kwargs: dict) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        name = layer._adapter()
        if name is not None and kwargs.get("replay") is not None:
            call = Call.of(layer.base_layer, args, kwargs)
            self.latents.append(layer.latents(name, *layer.arriving(hidden, call)))
            self.starts.append(layer.start(name, call))


def contributions(
    layer: PteAttention, latents: tuple[Tensor, Tensor], start: tuple[Tensor, Tensor], plan: ReplayPlan
) -> tuple[Tensor, Tensor]:
    """S' of every token of every eviction, (J, E, n_g, r), and the accumulators S_0 .. S_J, (J + 1, n_g, r)."""
    name = layer._adapter()
    encoder = layer.pte_encoder[name]
    queries, first = start
    keys, values = (plan.pick(x, plan.evicted)[0] for x in latents)  # (J, E, H r)
    by_token = encoder.update(queries, keys.unsqueeze(2), values.unsqueeze(2))
    accumulators = encoder.advance_all(first, by_token.sum(1).unsqueeze(0))[0]
    return by_token, torch.cat([first.unsqueeze(0), accumulators])


def describe(by_token: Tensor, accumulators: Tensor, encoder) -> dict:
    """Of one layer: norms of S and S', cosines of successive S, each token's share of |S'|, and that over |S|."""
    states, updates = encoder.state(accumulators), by_token.sum(1)
    norm = updates.norm(dim=(-2, -1))
    along = (by_token * updates.unsqueeze(1)).sum((-2, -1)) / norm.unsqueeze(1).clamp(min=1e-30)
    flat, before = states.flatten(1), accumulators[:-1].flatten(1).norm(dim=1).clamp(min=1e-30)
    return {
        "state_norm": flat.norm(dim=1).tolist(),
        "accumulator_norm": accumulators.flatten(1).norm(dim=1).tolist(),
        "update_over_state": (norm / before).tolist(),
        "cosine_to_last": torch.cosine_similarity(flat[1:], flat[:-1], dim=1).tolist(),
        "cosine_to_start": torch.cosine_similarity(flat[1:], flat[:1], dim=1).tolist(),
        "token_share": (along / norm.unsqueeze(1).clamp(min=1e-30)).tolist(),
        "token_moved": (along / before.unsqueeze(1)).tolist(),
    }


@torch.no_grad()
def inspect(model: PeftModel, prompt_ids: list[int], completion_ids: list[int], schedule: Schedule, pad: int) -> dict:
    """Everything that is written, but for the words.

    Raises:
        ValueError: no PTE adapter, one that adapts k or v or has the delta rule, or a completion without an eviction.
    """
    layers = active_layers(model)
    if not layers:
        raise ValueError("the adapter is not a PTE adapter: there is no S to look at")
    config = layers[0].config[layers[0]._adapter()]
    if {"k_proj", "v_proj"} & set(config.target_modules) or not config.encode_evicted:
        raise ValueError(
            f"target_modules={config.target_modules}, encode_evicted={config.encode_evicted}: keys and values must be "
            "the base model's, and evicted tokens encoded"
        )
    if config.state_update == "delta":
        raise ValueError(
            "state_update='delta': what a token writes depends on what is remembered already, so it has no share of "
            "S'; allowed are recursive, sum and gated_sum"
        )
    fed = completion_ids[:-1]  # the last token is sampled, and evicts nothing
    ids, mask = left_pad([[*prompt_ids, *fed]], pad, model.device)
    inputs = replay_inputs(model, mask, len(prompt_ids), schedule)
    plan: ReplayPlan = inputs["replay"]
    if not plan.count:
        raise ValueError(
            f"{len(completion_ids)} tokens under window={schedule.window}: nothing is evicted; take a smaller one"
        )
    with Watch(model) as watch:
        model(input_ids=ids, **inputs, logits_to_keep=1)
    found = []
    for layer, latents, start in zip(layers, watch.latents, watch.starts, strict=True):
        by_token, accumulators = contributions(layer, latents, start, plan)
        found.append(describe(by_token, accumulators, layer.pte_encoder[layer._adapter()]))
    measured = kl_per_token(model, prompt_ids, completion_ids, schedule, pad)
    kl, agrees, since = (measured[name] for name in ("kl", "agrees", "since"))
    return {
        "window": schedule.window,
        "evict": plan.evicted.shape[2],
        "evictions": plan.count,
        "layers": found,
        "evicted": (plan.evicted[0] - len(prompt_ids)).tolist(),
        "kl": kl.tolist(),
        "top1_agreement": agrees.tolist(),
        "since_eviction": since.tolist(),
    }


def by_distance(kl: list[float], since: list[int]) -> dict[int, float]:
    """Mean KL by tokens since the last eviction; -1: before the first."""
    groups: dict[int, list[float]] = {}
    for value, distance in zip(kl, since, strict=True):
        groups.setdefault(distance, []).append(value)
    return {distance: sum(group) / len(group) for distance, group in sorted(groups.items())}


def movers(found: dict, words: list[str], count: int = 20) -> list[dict]:
    """The evicted tokens that moved S furthest, by their part of |S'| / |S| in the mean over layers."""
    moved = torch.tensor([layer["token_moved"] for layer in found["layers"]]).mean(0)
    rows = [
        {"token": words[place], "thought": place, "eviction": k + 1, "moved": moved[k, e].item()}
        for k, places in enumerate(found["evicted"])
        for e, place in enumerate(places)
    ]
    return sorted(rows, key=lambda row: -row["moved"])[:count]
