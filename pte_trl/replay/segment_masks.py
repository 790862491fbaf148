"""What the tokens of a segment see, for every type of layer.

Tokens are numbered as everywhere: thought tokens from 0, those of the prompt, padding included, below.
"""

import torch
from torch import Tensor, nn

from pte_trl.cache.masks import config_of, mask_for
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.transformers import layer_types_and_sizes

# transformers' names of the masks of each sort.
FULL, SLIDING = ("full_attention", "hybrid"), ("sliding_attention", "hybrid_sliding")
CHUNKED, RECURRENT = ("chunked_attention",), ("linear_attention", "conv")


def segment_masks(model: nn.Module, mask: Tensor, prompt: int, span: range, schedule: Schedule) -> Tensor | dict:
    """The attention mask of a segment: one, or for a model with several types of layers one for each type.

    Args:
        mask: (batch, prompt + completion), 0 where padded.
        prompt: padded length of the prompts.
        span: the segment.
    """
    types, sizes = layer_types_and_sizes(config_of(model))
    at = torch.arange(-prompt, span.stop, device=mask.device)
    real = nn.functional.pad(mask[:, :prompt].bool(), (0, span.stop), value=True)
    query = at[prompt + span.start :].unsqueeze(1)

    def seen(key: Tensor, allowed: Tensor) -> Tensor:
        """(batch, 1, queries, keys), as the model's attention takes it."""
        visible = allowed & (key <= query) & real[:, None, prompt + key]
        # A padded query sees itself, so that no row of the softmax is empty.
        return mask_for(model, (visible | (key == query)).unsqueeze(1))

    key = torch.cat([at[:prompt], at[prompt + schedule.first_visible(max(0, span.start)) :]])
    full = seen(key, (key < 0) | (key >= schedule.first_visible(query)))
    if set(types) <= {"full_attention"}:
        return full
    masks = dict.fromkeys(FULL, full) | dict.fromkeys(RECURRENT, mask[:, prompt + span.start : prompt + span.stop])
    if "sliding_window" in sizes:
        window = sizes["sliding_window"]
        key = at[max(0, prompt + span.start - window + 1) :]  # what the layer holds, then the segment
        masks |= dict.fromkeys(SLIDING, seen(key, key > query - window))
        if "chunked_attention" in types:
            # Chunks are counted from a text's first token.
            padding = prompt - mask[:, :prompt].sum(1).view(-1, 1, 1)
            chunk = [(prompt + x - padding).div(window, rounding_mode="floor") for x in (query, key)]
            masks |= dict.fromkeys(CHUNKED, seen(key, chunk[0] == chunk[1]))
    return masks
