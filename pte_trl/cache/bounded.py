"""The decode view: a transformers `Cache` that keeps the prompt, a window of thought tokens, and the state S.

What decoding changes lives in its layers and nowhere else: keys, values, the encoder's accumulator, the counts, and
the states of layers that do not attend in full. Modules stay pure. The first forward fills the prompt, or the first
few after `expect_prompt`; every later one feeds thought tokens, one by one or in chunks that no eviction interrupts
(`BoundedCache.pieces`).
"""

from functools import partial

from torch import Tensor
from transformers import Cache, CacheLayerMixin, PreTrainedConfig

from pte_trl.cache.bounded_layer import BoundedLayer
from pte_trl.cache.layers import RecurrentLayer, SlidingLayer, held, layers_of
from pte_trl.cache.schedule import Schedule

__all__ = ["BoundedCache", "BoundedLayer"]


class Unconfigured(list):
    """Whether each layer slides, of a cache that was not told of the model's layers: refuses to be asked for sliding.

    Masks of full attention look for a layer that does not slide, those of sliding layers for one that does.
    """

    def __contains__(self, sliding: object) -> bool:
        if sliding is True:
            refuse_unconfigured("sliding layers")
        return super().__contains__(sliding)


def refuse_unconfigured(layers: str) -> None:
    """Refuses a model with such layers, whose masks and states would be wrong in a cache of bounded layers alone.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        f"past_key_values: this model has {layers}, of which a BoundedCache without config knows nothing; make it by "
        "BoundedCache(window, config=model.config)"
    )


class BoundedCache(Cache):
    """Cache policy D of eq. 2 for `model.generate(..., past_key_values=BoundedCache(window=...))`.

    Works for a bare model, a LoRA model (nothing is learnt from the evicted) and a PTE model (they are encoded).
    One object serves one batch; `reset()` makes it ready for another. A batch may be continued, as in a chat: what
    the first forward has brought is the prompt and stays, all later turns count as thought and live in the window
    (eq. 2 knows one prompt). What `generate` takes and refuses with this cache: `pte_trl.cache.generate`.

    Args:
        window: W, thought tokens kept.
        evict_ratio: share of the window that leaves when it is full.
        config: of the model, for a model with sliding or recurrent layers (`pte_trl.cache.layers`): `generate`
            finds it by itself, a plain forward of such a model is refused without. Where all layers attend in full it
            changes nothing.
    """

    def __init__(self, window: int, evict_ratio: float = 0.25, config: PreTrainedConfig | None = None):
        self.schedule = Schedule(window, evict_ratio)
        # Not a lambda over `self`: a cycle would keep the whole cache until the garbage collector runs.
        super().__init__(layer_class_to_replicate=partial(BoundedLayer, self.schedule))
        if config is not None:
            self.configure(config)

    @classmethod
    def from_schedule(cls, schedule: Schedule, config: PreTrainedConfig | None = None) -> "BoundedCache":
        return cls(schedule.window, schedule.evict_ratio, config)

    def configure(self, config: PreTrainedConfig) -> None:
        """Gives the cache the layers of a model, which it must have already where it holds tokens.

        Raises:
            ValueError: `layers_of` knows no layer for it, or the tokens were fed to another model.
        """
        found = layers_of(config, self.schedule)
        fits = len(self.layers) == len(found) and all(map(_serves, self.layers, found))
        if not fits and any(map(held, self.layers)):
            raise ValueError(
                f"past_key_values: this cache holds tokens of a model with other layers than this {config.model_type} "
                "has; call cache.reset() first or take a fresh cache"
            )
        expected = self.first.expected
        self.layers, self.layer_class_to_replicate = self.layers if fits else found, None
        if not fits:
            self.expect_prompt(expected)

    @property
    def configured(self) -> bool:
        """Whether the cache knows the layers of its model; without, it makes bounded ones as they are asked for."""
        return self.layer_class_to_replicate is None

    @property
    def bounded(self) -> list[BoundedLayer]:
        """The layers of full attention."""
        return [layer for layer in self.layers if isinstance(layer, BoundedLayer)]

    @property
    def mixed(self) -> bool:
        """Whether some layers do not attend in full."""
        return any(isinstance(layer, SlidingLayer | RecurrentLayer) for layer in self.layers)

    @property
    def first(self) -> BoundedLayer:
        """The first layer of full attention; all count alike."""
        for layer in self.layers:
            if isinstance(layer, BoundedLayer):
                return layer
        return self.layer(0)

    def layer(self, layer_idx: int) -> BoundedLayer:
        """The layer's part, made at the first use."""
        while not self.configured and len(self.layers) <= layer_idx:
            self.layers.append(self.layer_class_to_replicate())
        return self.layers[layer_idx]

    def expect_prompt(self, tokens: int | None) -> None:
        """Declares the first `tokens` tokens to be the prompt, however many forwards they take.

        Raises:
            ValueError: there are thought tokens already, or more prompt tokens than that.
        """
        first = self.first
        if tokens is not None and (first.fed or not max(1, first.prompt) <= tokens):
            raise ValueError(
                f"expect_prompt({tokens}): the cache holds {first.prompt} prompt and {first.fed} thought tokens "
                "already; call it on an empty cache, with at least 1"
            )
        if not self.configured:
            self.layer_class_to_replicate = partial(self.layer_class_to_replicate.func, self.schedule, tokens)
        for layer in self.bounded:
            layer.expected = tokens

    def reset(self) -> None:
        super().reset()
        self.expect_prompt(None)

    def room(self, fed: int) -> int:
        """How many thought tokens can be fed in one forward after `fed`."""
        return self.schedule.room(fed)

    def pieces(self, tokens: int, longest: int | None = None) -> list[int]:
        """The next `tokens` tokens as lengths of forwards that no eviction interrupts.

        Args:
            longest: tokens of one forward at most.
        """
        first, found = self.first, []
        fed, left = first.fed, (first.expected or first.prompt or tokens) - first.prompt
        while tokens:
            run = min(left or self.room(fed), tokens, longest or tokens)
            left, fed = (left - run, fed) if left else (0, fed + run)
            tokens -= run
            found.append(run)
        return found

    # ---- what a model asks ----------------------------------------------------------------------------------------

    def get_query_offset(self, layer_idx: int = 0) -> int:
        # A mask is built over what is kept, so in a bounded layer the first query follows it directly.
        layer = self.layer(layer_idx)
        if isinstance(layer, BoundedLayer):
            return layer.kept()
        return self.first.kept() if self.is_linear[layer_idx] else layer.get_seq_length()

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        layer = self.layer(layer_idx)
        return (self.first if self.is_linear[layer_idx] else layer).get_mask_sizes(query_length)

    @property
    def is_sliding(self) -> list[bool]:
        return super().is_sliding if self.configured else Unconfigured(super().is_sliding)

    @property
    def is_linear(self) -> list[bool]:
        """Whether each layer is recurrent and nothing else."""
        return [not isinstance(layer, CacheLayerMixin) for layer in self.layers]

    def update_conv_state(self, *args, **kwargs) -> Tensor:
        self._check_recurrent()
        return super().update_conv_state(*args, **kwargs)

    def update_recurrent_state(self, *args, **kwargs) -> Tensor:
        self._check_recurrent()
        return super().update_recurrent_state(*args, **kwargs)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        self._check_recurrent()
        for layer in self.layers if layer_idx is None else self.layers[layer_idx : layer_idx + 1]:
            if isinstance(layer, RecurrentLayer):
                layer.settle()  # it is what a layer asks before it reads its states
        return super().has_previous_state(layer_idx, state_idx)

    def _check_recurrent(self) -> None:
        if not self.configured:
            refuse_unconfigured("recurrent layers")

    def mask_columns(self, length: int) -> int:
        """Columns of the mask (batch, tokens) of a forward of `length` tokens: the prompt, and ones after it.

        As many as are kept where all layers are bounded. A sliding layer counts every token that it has seen.
        """
        return (self.get_seq_length() if self.mixed else self.first.kept()) + length

    # ---- what it holds --------------------------------------------------------------------------------------------

    @property
    def evictions(self) -> int:
        """Evictions so far."""
        return self.first.evicted if self.layers else 0

    def evictions_after(self, fed: int) -> int:
        """Evictions when `fed` thought tokens have been fed."""
        return self.schedule.evictions(fed)

    @property
    def nbytes(self) -> int:
        """Bytes that the cache holds for its whole batch, the encoder's accumulator included."""
        return sum(x.numel() * x.element_size() for layer in self.layers for x in _stored(layer))


def _serves(layer, wanted) -> bool:
    """Whether a layer keeps what another would: a layer of an eviction strategy serves as a bounded one."""
    sizes = ("sliding_window", "number_of_states")
    return isinstance(layer, type(wanted)) and all(
        getattr(layer, name, None) == getattr(wanted, name, None) for name in sizes
    )


def _stored(layer) -> list[Tensor]:
    """The tensors of a layer that take memory for every batch; `queries` follow from the weights alone."""
    found = held(layer)
    found.pop("queries", None)
    if getattr(layer, "buffers", None) is not None:
        found |= dict(zip(("keys", "values"), layer.buffers, strict=True))
    return list(found.values())
