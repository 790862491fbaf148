"""Tiny models and the two views under test: a decode with a real bounded cache, and its replay."""

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from pte_trl import BoundedCache, PteConfig
from pte_trl.adapter.arrival import calls_of
from pte_trl.adapter.attention import PteAttention
from pte_trl.cache.masks import prompt_mask
from pte_trl.cache.schedule import Schedule
from pte_trl.replay.plan import replay_inputs

FAMILIES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
}
VOCAB = 64
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL_SEVEN = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TEMPERATURE = 0.6


# The encoder's options: tests of exactness, gradients and PEFT walk these.
OPTIONS = {
    "gated sum": {"state_update": "gated_sum"},
    "delta": {"state_update": "delta"},
    "write gate": {"write_gate": True},
    "centre": {"centre": True, "whiten": True},
    "per head": {"state_per_head": True},
    "delta per head": {"state_update": "delta", "state_per_head": True, "whiten": True},
    "all options": {
        "state_update": "delta",
        "centre": True,
        "write_gate": True,
        "state_per_head": True,
        "read": "column",
    },
}


class WideNorm(nn.Module):
    """RMSNorm in the model's own precision; transformers' computes in float32 whatever it is given."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)


def tiny(family: str = "qwen2", dtype: torch.dtype = torch.float64, wide_norms: bool = False, **config):
    """A model of 3 layers with a weight scale at which the random net is not chaotic.

    Args:
        wide_norms: replace the RMSNorms by ones without float32 inside, where a test needs true float64.
        config: over the model's own defaults.
    """
    config_class, model_class = FAMILIES[family]
    shape = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"head_dim": 8, "intermediate_size": 48, "vocab_size": VOCAB, "max_position_embeddings": 512}
    shape |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
    if family == "mistral":
        shape["sliding_window"] = None
    model = model_class(config_class(**{**shape, **config})).to(dtype).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.8, 1.2)
            else:
                parameter.normal_(std=1.0 if "embed_tokens" in name else 0.15)
    if wide_norms:
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if type(child).__name__.endswith("RMSNorm"):
                    setattr(module, name, WideNorm(child))
    return model


def with_pte(model: PreTrainedModel, seed: int = 1, adapter_name: str = "default", **config) -> PeftModel:
    """The model with a PTE adapter that does something: `pte_up` and what is fitted or gates are random."""
    torch.manual_seed(seed)
    config = PteConfig(**{"rank": 5, "num_global_tokens": 6, "alpha": 5.0, **config})
    model = get_peft_model(model, config, adapter_name=adapter_name, autocast_adapter_dtype=False).eval()
    randomise_up(model, adapter_name)
    return model


@torch.no_grad()
def randomise_up(model: nn.Module, adapter_name: str = "default") -> None:
    for name, tensor in model.state_dict().items():
        if f"pte_up.{adapter_name}" in name:
            tensor.normal_(std=0.1)
        elif "whitener" in name:
            tensor.add_(torch.randn_like(tensor), alpha=0.3 * tensor.abs().max().item())
        elif f"pte_encoder.{adapter_name}" in name and any(part in name for part in ("centre", "write_gate", "rule.")):
            tensor.add_(torch.randn_like(tensor))


def start_of(model: PeftModel, layer: PteAttention, name: str = "default") -> tuple[Tensor, Tensor]:
    """Global queries and the accumulator before any eviction of one layer, which is called for that."""
    with calls_of([layer]) as calls:
        model(input_ids=torch.ones(1, 2, dtype=torch.long))
    return layer.start(name, calls[layer])


def with_lora(model: PreTrainedModel, seed: int = 1) -> PeftModel:
    torch.manual_seed(seed)
    config = LoraConfig(r=5, lora_alpha=5, target_modules=["q_proj", "o_proj"], task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    return model


def left_padded_batch(lengths: list[int], completion: int, seed: int = 0) -> tuple[Tensor, Tensor, int]:
    """Random tokens: (ids, attention mask, padded prompt length), prompts of `lengths` padded on the left."""
    prompt = max(lengths)
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, VOCAB, (len(lengths), prompt + completion), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        ids[row, : prompt - length] = 0
        mask[row, : prompt - length] = 0
    return ids, mask, prompt


def log_probs(logits: Tensor) -> Tensor:
    return (logits.to(torch.promote_types(logits.dtype, torch.float32)) / TEMPERATURE).log_softmax(-1)


def decode_logps(
    model: nn.Module, ids: Tensor, mask: Tensor, prompt: int, window: int, ratio: float = 0.25, chunked: bool = False
) -> Tensor:
    """(batch, completion, vocab) log-probs of a decode with a bounded cache; autograd flows through the cache.

    Args:
        chunked: feed the longest chunks that no eviction interrupts, instead of token by token.
    """
    cache = BoundedCache(window, ratio, model.config)
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    thoughts = ids.shape[1] - prompt - 1  # the last token is sampled, never fed
    runs = Schedule(window, ratio).chunks(thoughts) if chunked else [range(t, t + 1) for t in range(thoughts)]
    spans = [(0, prompt)] + [(prompt + run.start, prompt + run.stop) for run in runs]
    logits = []
    for start, stop in spans:
        out = model(
            input_ids=ids[:, start:stop],
            attention_mask=prompt_mask(model, mask[:, :stop]) if start == 0 else mask[:, :stop],
            position_ids=position_ids[:, start:stop],
            past_key_values=cache,
            use_cache=True,
        ).logits
        logits.append(out[:, -1:] if start == 0 else out)
    assert cache.evictions == Schedule(window, ratio).evictions(thoughts)
    return log_probs(torch.cat(logits, dim=1))


def schedules_of(window: int | Tensor | list[Schedule], ratio: float = 0.25) -> Schedule | list[Schedule]:
    """Of one W for all samples, or of a tensor with the W of each; schedules as they are."""
    if isinstance(window, list):
        return window
    if isinstance(window, Tensor):
        return [Schedule(w, ratio) for w in window.tolist()]
    return Schedule(window, ratio)


def replay_logps(model: nn.Module, ids: Tensor, mask: Tensor, prompt: int, window, ratio: float = 0.25) -> Tensor:
    """The same from one forward; `window` as in `schedules_of`."""
    logits = model(input_ids=ids, **replay_inputs(model, mask, prompt, schedules_of(window, ratio))).logits
    return log_probs(logits[:, prompt - 1 : -1])


def chosen(logps: Tensor, ids: Tensor, prompt: int) -> Tensor:
    """(batch, completion) log-probs of the tokens in `ids`."""
    return logps.gather(-1, ids[:, prompt:, None]).squeeze(-1)


def gap(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()
