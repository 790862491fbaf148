"""The evictions that the samples of a training have: those of its cache policy, or drawn where that has a range.

A draw is decided by the seed, by the optimizer step with the rollout in it, and by the place of the sample, or of its
group, among those of all processes. No generator goes from one draw to the next. So a run that resumes at a step draws
what it would have drawn, and so does one on another number of GPUs whose rollouts have as many samples in all.
"""

from pte_trl.cache.schedule import Schedule


class RolloutCount:
    """Rollouts within one optimizer step: several where `steps_per_generation` is below the accumulation."""

    def __init__(self):
        self.step, self.count = -1, 0

    def next(self, step: int) -> int:
        """0 for the first rollout in `step`, then 1, 2, ..."""
        self.count = self.count + 1 if step == self.step else 0
        self.step = step
        return self.count


def schedules_for(
    trainer, prompt_ids: list[list[int]], group: int = 1, completion_ids: list[list[int]] | None = None
) -> list[Schedule]:
    """The schedule of every sample of a rollout on this process.

    In an evaluation of the trainer a draw is decided by the seed and the row's tokens, so that all of them draw alike.

    Args:
        trainer: of a bounded method, about to sample completions of these prompts.
        prompt_ids: token ids of each prompt; one that has several completions comes so often, one after another.
        group: samples in a row that have one prompt, and get one draw.
        completion_ids: of a dataset that brings its completions; its rows may all have one prompt.
    """
    policy, seed = trainer.args.cache_policy, trainer.args.seed
    if not policy.drawn:
        return [policy.schedule(len(ids)) for ids in prompt_ids]
    if trainer.model.training:
        step = trainer.state.global_step
        rollout = f"{seed} {step} {trainer.rollout_count.next(step)}"
        # Every process has the next so many samples of the rollout; a group may lie on two of them.
        first = trainer.accelerator.process_index * len(prompt_ids)
        keys = [f"{rollout} {(first + place) // group}" for place in range(len(prompt_ids))]
    else:
        rows = prompt_ids if completion_ids is None else zip(prompt_ids, completion_ids, strict=True)
        keys = [f"{seed} evaluation {row}" for row in rows]
    return [policy.draw(key).schedule(len(ids)) for key, ids in zip(keys, prompt_ids, strict=True)]
