"""Private names of TRL."""

from trl import TrlParser
from trl.import_utils import is_vllm_available  # whether vLLM is here in a version that TRL can use
from trl.models import unwrap_model_for_generation  # the model inside DDP or ZeRO, with whole weights, for a rollout
from trl.trainer.utils import (
    add_fused_lm_head,  # log-probs and entropies without all logits in memory: benchmarks train as TRL does
    is_async_callable,  # TRL awaits such a reward itself, so it must not be wrapped
    pad,  # one batch of sequences of different lengths, as TRL makes it
)

__all__ = [
    "add_fused_lm_head",
    "distributed_backend",
    "flags_of",
    "is_async_callable",
    "is_vllm_available",
    "metrics_of",
    "micro_batches_of",
    "pad",
    "replace_micro_batches",
    "tokenize_prompts",
    "unwrap_model_for_generation",
]


def distributed_backend(trainer):
    """TRL's view of the engine: `zero_stage` (0 without DeepSpeed), `fsdp_version` (None without FSDP), `is_zero3`,
    `is_fsdp`, and `gather_params(parameters)`, which makes them whole under ZeRO-3."""
    return trainer._dist


def metrics_of(trainer) -> dict[str, list[float]]:
    """What TRL averages over a logging step, by name, for the mode under way; what we measure is added to it."""
    return trainer._metrics["train" if trainer.model.training else "eval"]


def micro_batches_of(trainer) -> list[dict] | None:
    """Micro-batches of the rollout that a trainer trains on, another list for every rollout; None before the first.

    Made by `_prepare_inputs`: `steps_per_generation` of a GRPO, `gradient_accumulation_steps` of a distillation.
    """
    return trainer._buffered_inputs


def replace_micro_batches(trainer, micro_batches: list[dict]) -> dict:
    """Has a trainer train on these instead, as many; returns the one whose turn it is."""
    trainer._buffered_inputs = micro_batches
    return micro_batches[trainer._step % len(micro_batches)]


def tokenize_prompts(trainer, prompts: list) -> list[list[int]]:
    """Token ids of prompts as the trainer's rollouts get them, for a calibration on the same tokens."""
    prompt_ids, _, _ = trainer._tokenize_prompts(prompts)
    return prompt_ids


def flags_of(parser: TrlParser) -> set[str]:
    """Every flag that the parser knows (`--learning_rate`), so that an unknown one is refused before it reads values.

    The attribute is that of argparse, which has no public one.
    """
    return set(parser._option_string_actions)
