"""A trainer's rollout: the engine inside whatever DeepSpeed, FSDP or DDP has made of the model."""

from collections.abc import Sequence
from contextlib import nullcontext

from pte_trl.cache.policy import CachePolicy
from pte_trl.cache.schedule import Schedule
from pte_trl.compat.trl import unwrap_model_for_generation
from pte_trl.rollouts.rollout import Rollout, rollout
from pte_trl.runtime.sharding import rollout_engine_must_go, whole_weights
from pte_trl.training.replays import engine_fits


def trainer_rollout(
    trainer,
    prompt_ids: list[list[int]],
    policy: CachePolicy,
    schedules: Sequence[Schedule] | None = None,
    base: bool = False,
) -> Rollout:
    """One completion per prompt of the model that `trainer` trains, or of its `base`, with the adapter off.

    Args:
        trainer: a GRPO or distillation trainer of this project; it keeps the engine between rollouts.
        policy: what is kept of the sequences.
        schedules: of each completion, where they were decided before.
    """
    args = trainer.args
    with (
        unwrap_model_for_generation(
            trainer.model_wrapped,
            trainer.accelerator,
            gather_deepspeed3_params=args.ds3_gather_for_generation,
            gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,
        ) as model,
        trainer.accelerator.autocast(),
        whole_weights(model),
        model.disable_adapter() if base else nullcontext(),
    ):
        result = rollout(
            model,
            prompt_ids,
            policy,
            schedules=schedules,
            max_new_tokens=trainer.max_completion_length,
            temperature=trainer.temperature,
            eos_token_ids=trainer.eos_token_ids,
            pad_token_id=trainer.processing_class.pad_token_id,
            batch_size=args.rollout_batch_size,
            engine_cache=trainer.engine_cache,
            compile=args.compile_rollouts,
        )
    if rollout_engine_must_go(trainer, engine_fits(trainer)):
        trainer.engine_cache.release()
    return result
