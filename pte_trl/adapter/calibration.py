"""A fresh adapter's encoders, fitted to the keys and values that the base model really has.

A data-free initialisation cannot know two things about a real model. Its keys are far from unit variance, so |S'|
would be far from `init_ratio`. And they lie almost on one line (SmolLM2's, docs/log.md): with random maps S' starts
with hardly more than one dimension, and a training at 1e-3 made it a hundred times as large. With `whiten`, the maps
are therefore learned as W^a = M P: P, fixed and of every kv head, takes the base model's keys (and another one its
values) to unit second moments; only M is trained. Eq. 4 is unchanged. What it gains: docs/results.md, "Choices".

With `centre`, the mean key and the mean value of every kv head are taken out of evicted tokens first, and the moments
are those about the mean.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from pte_trl.adapter.arrival import Call, calls_of
from pte_trl.adapter.attention import PteAttention
from pte_trl.adapter.model import active_layers
from pte_trl.adapter.projections import as_encoded, rows
from pte_trl.adapter.updates import wide
from pte_trl.cache.masks import prompt_mask

RIDGE = 0.01  # of the mean eigenvalue: directions that the text at hand hardly shows are not blown up


@dataclass
class Found:
    """What one layer's encoder needs to know of the base model.

    Attributes:
        ratio: |S'| / |S| of one eviction, after whitening where the adapter whitens.
        centres: (kv heads, head_dim) mean key and value, on the CPU; None where it does not centre.
        whiteners: (kv heads, head_dim, head_dim) of keys and of values, on the CPU; None where it does not whiten.
        dimensions: how many of its dimensions a head's keys fill (`filled`), mean over heads; None without whitening.
    """

    ratio: float
    centres: tuple[Tensor, Tensor] | None = None
    whiteners: tuple[Tensor, Tensor] | None = None
    dimensions: float | None = None


def calibrate(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, evict: int) -> list[float]:
    """Fits the encoders of a fresh adapter, so that |S'| / |S| is `init_ratio` on real keys and values.

    S_0 is normalised, hence unchanged up to rounding where nothing is whitened.

    Args:
        input_ids, attention_mask: (batch, length) some texts, padded on the left.
        evict: E, tokens of one eviction; the last E tokens of every text are taken for them.

    Returns:
        |S'| / |S| of every layer before the rescaling.
    """
    found = measure(model, input_ids, attention_mask, evict)
    fit(model, found)
    return [each.ratio for each in found]


@torch.no_grad()
def measure(model: nn.Module, input_ids: Tensor, attention_mask: Tensor, evict: int, reach: int = 0) -> list[Found]:
    """What `fit` needs, layer by layer; args as `calibrate`.

    Args:
        reach: positions that the texts are spread over: keys are taken after rotary, so their mean depends on it.
    """
    found = []
    for layer, call, keys, values in keys_and_values(model, input_ids, attention_mask, reach):
        encoder, config = layer.pte_encoder[layer._adapter()], layer.config[layer._adapter()]
        centres = whiteners = dimensions = None
        # Without the first token of a text: its keys and values are outliers, and a prompt's are never evicted.
        real = attention_mask.bool() & (attention_mask.cumsum(1) > 1)
        tokens = [wide(x.transpose(1, 2)[real]) for x in (keys, values)]
        if config.centre:
            centres = [x.mean(0) for x in tokens]
            tokens = [x - centre for x, centre in zip(tokens, centres, strict=True)]
            encoder.set_centres_(*centres)
        if config.whiten:
            moments = [second_moments(x) for x in tokens]
            whiteners, dimensions = [inverse_root(x) for x in moments], filled(moments[0]).mean().item()
            encoder.set_whiteners_(*whiteners)
        take = min(evict, input_ids.shape[1])
        last = (rows(x[:, :, -take:]) for x in (keys, values))
        queries, _ = layer.start(layer._adapter(), call)
        update = encoder.written(encoder.update(queries, *encoder.latents(*last))) * (evict / take)
        ratio = update.norm(dim=(-2, -1)).mean().item() / update.shape[-2:].numel() ** 0.5
        found.append(Found(ratio, _on_cpu(centres), _on_cpu(whiteners), dimensions))
    return found


def _on_cpu(tensors: list[Tensor] | None) -> tuple[Tensor, ...] | None:
    """As every process gets them: unpickled, a tensor of a GPU goes to the GPU of that number."""
    return None if tensors is None else tuple(x.cpu() for x in tensors)


@torch.no_grad()
def fit(model: nn.Module, found: list[Found]) -> None:
    """Sets what is fitted and scales S' of each PTE layer so that |S'| / |S| becomes the adapter's `init_ratio`."""
    for layer, each in zip(active_layers(model), found, strict=True):
        name = layer._adapter()
        encoder = layer.pte_encoder[name]
        if each.centres is not None:
            encoder.set_centres_(*each.centres)
        if each.whiteners is not None:
            encoder.set_whiteners_(*each.whiteners)
        encoder.scale_update_(layer.config[name].init_ratio / max(each.ratio, 1e-12))


def second_moments(x: Tensor) -> Tensor:
    """(tokens, heads, head_dim) -> (heads, head_dim, head_dim) mean of x x^T, at least in float32."""
    x = wide(x)
    return torch.einsum("nhi,nhj->hij", x, x) / len(x)


def inverse_root(moments: Tensor) -> Tensor:
    """(heads, n, n) -> the same, symmetric P such that x P has unit second moments."""
    values, vectors = torch.linalg.eigh(moments)
    values = values + RIDGE * values.mean(-1, keepdim=True)
    return vectors @ torch.diag_embed(values**-0.5) @ vectors.mT


def filled(moments: Tensor) -> Tensor:
    """(heads, n, n) -> (heads,) (sum of eigenvalues)^2 / sum of their squares: 1 on a line, n where all are alike."""
    return moments.diagonal(dim1=-2, dim2=-1).sum(-1).square() / moments.square().sum((-2, -1))


def keys_and_values(
    model: nn.Module, input_ids: Tensor, attention_mask: Tensor, reach: int = 0
) -> Iterator[tuple[PteAttention, Call, Tensor, Tensor]]:
    """Every layer with the active adapter, how it is called, and the base model's keys and values in it.

    Under full attention; both are (batch, kv heads, length, head_dim), as the encoder takes them.
    """
    cache = DynamicCache(config=model.config)
    layers = active_layers(model)
    shift = torch.linspace(0, max(0, reach - input_ids.shape[1]), len(input_ids), device=input_ids.device).long()
    positions = (attention_mask.cumsum(1) - 1).clamp(min=0) + shift.unsqueeze(1)
    with model.disable_adapter(), calls_of(layers) as calls:
        model(
            input_ids=input_ids,
            attention_mask=prompt_mask(model, attention_mask),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
    for layer in layers:
        held = cache.layers[layer.base_layer.layer_idx]
        yield layer, calls[layer], *as_encoded(layer.base_layer, held.keys, held.values)
