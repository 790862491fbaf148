"""How many completions are decoded at once, so that they fit in memory, and the engine kept for the next rollout."""

import gc
from collections.abc import Callable
from typing import TypeVar

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from pte_trl.adapter.model import geometry_of
from pte_trl.cache.bounded import BoundedCache
from pte_trl.cache.layers import held, hold
from pte_trl.rollouts.engine import Engine, Room, precision
from pte_trl.rollouts.ring import RingCache
from pte_trl.rollouts.sampling import Sampling

SHARE = 0.6  # of the free memory for the cache; the rest is for activations and logits
WASTE = 8  # an engine of fewer rows than memory allows is used again if at most this part of them is missing
# On CUDA buffers are rounded up, since another shape is another engine, whose graphs are captured anew.
PLACES, EVICT = 128, 32
Result = TypeVar("Result")


def cache_bytes(config, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values of one sample that keeps so many tokens, where all layers attend in full.

    S is small beside them. Of a model that is there, `row_bytes` counts every type of layer.
    """
    shape = geometry_of(config)
    heads = shape["num_hidden_layers"] * shape["num_key_value_heads"]
    return 2 * heads * shape["head_dim"] * tokens * dtype.itemsize


def rounded(room: Room, device: torch.device) -> Room:
    """What an engine's buffers have on this device for rows that need `room`."""
    if device.type != "cuda":
        return room
    units = {"places": PLACES, "evict": EVICT, "tokens": PLACES}
    return Room(**{name: -(-getattr(room, name) // unit) * unit for name, unit in units.items()})


@torch.no_grad()
def row_bytes(model: nn.Module, places: int, tokens: int) -> int:
    """Bytes that a row takes in an engine's cache, each type of layer by itself: of the shapes that a token has there.

    Args:
        places, tokens: as in `Room`.
    """
    source, token = (
        BoundedCache(window=1, config=model.config),
        torch.zeros(1, 1, dtype=torch.long, device=model.device),
    )
    with precision(model.device):
        model(input_ids=token, position_ids=token, past_key_values=source, use_cache=True, logits_to_keep=1)
    for layer in source.layers:
        hold(layer, {name: x.to("meta") for name, x in held(layer).items()})
    cache = RingCache(1, places, 1, "meta", tokens)
    cache.begin(source)
    return cache.nbytes


def auto_batch_size(
    model: nn.Module, places: int, free: int | None = None, held: int = 0, tokens: int | None = None
) -> int | None:
    """Rows whose caches fit in SHARE of the free memory; None (all at once) on a CPU.

    Args:
        places: prompt and thought tokens of a row (`Room.places`).
        free: bytes; those that the model's GPU has, and torch holds unused, if None.
        held: bytes of a kept engine, which is used or goes.
        tokens: that a row ever has (`Room.tokens`), where layers have windows of their own; None: `places`.
    """
    if free is None:
        if model.device.type != "cuda":
            return None
        unused = torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        free = torch.cuda.mem_get_info(model.device)[0] + unused + held
    return max(1, int(SHARE * free / row_bytes(model, places, tokens or places)))


def halving(run: Callable[[int], Result], rows: int, release: Callable[[], None] = lambda: None) -> Result:
    """`run(rows)`, with half as many rows each time the memory does not suffice; one row that does not fit raises.

    Args:
        release: frees what a failed try has left behind.
    """
    while True:
        try:
            return run(rows)
        except torch.OutOfMemoryError:
            if rows == 1:
                raise
        # Behind the handler: the exception holds the frames, and with them the tensors, of what has failed.
        rows = -(-rows // 2)
        # First the engine and its graphs: only then can the allocator give their pool back.
        release()
        gc.collect()
        torch.cuda.empty_cache()
        print(f"rollout: out of memory, continuing with {rows} samples at once", flush=True)


class EngineCache:
    """Keeps the last engine: its buffers, and on CUDA its captured graphs, serve the next batch of the same kind.

    An engine serves batches of fewer rows and shorter rows, too: a step computes rows in use and reads places in use.
    So a training under `window: auto`, whose batches need other rooms, soon has one that serves all of them.
    """

    def __init__(self):
        self.kind, self.engine = None, None

    def get(
        self,
        model: nn.Module,
        rows: int,
        room: Room,
        sampling: Sampling,
        compile: bool = False,
        least: int | None = None,
    ) -> Engine:
        """An engine whose rows have that room, or more; arguments as for `Engine`.

        Args:
            rows: that a new one gets.
            least: that a kept one must have; None: `rows`.
        """
        # Of every kind of adapter: a captured step goes on using those that were active then.
        layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        adapters = [() if layer.disable_adapters else tuple(layer.active_adapters) for layer in layers]
        device = model.device.type  # autocast decides the dtype of the buffers, too
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        kind = (id(model), model.device, model.dtype, autocast, adapters, sampling, compile)
        if kind != self.kind or not self._roomy(least or rows, room):
            self.release()  # before the new one's buffers are made
            room = rounded(room, model.device)
            self.kind, self.engine = kind, Engine(model, rows, room, sampling, compile)
        return self.engine

    def _roomy(self, rows: int, room: Room) -> bool:
        return self.engine.cache.has_room(rows, room.places, room.evict, room.tokens)

    @property
    def nbytes(self) -> int:
        """Bytes of the kept engine's cache; 0 without one."""
        return 0 if self.engine is None else self.engine.cache.nbytes

    def release(self) -> None:
        """Frees the buffers and the graphs."""
        if self.engine is not None:
            self.engine.close()
        self.kind = self.engine = None
