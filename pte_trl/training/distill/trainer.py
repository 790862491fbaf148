"""Cache distillation on TRL's `DistillationTrainer`: the bounded policy learns to be the full-cache policy.

The teacher is the base model with the full cache, the student the same weights with the adapter, under the window, by
the one-pass replay. The signal is dense, needs no gold answers, and what is saved is where GRPO starts.

Used from TRL: prompts and their tokenizing, generation batches and their split into micro-batches, the loss's
route through the engine's wrapper, logging, saving. `GKDTrainer` would hold both models' logits whole and starts from
written answers; `GOLDTrainer` is for two tokenizers. Replaced are: who writes the completions, and the loss, since
TRL's wants a second model as the teacher and its student sees the full cache.
"""

import torch
from torch import Tensor
from trl import DistillationTrainer

from pte_trl.cache.policy import FULL_CACHE
from pte_trl.cache.schedule import Schedule, packed, unpacked
from pte_trl.training.distill.config import PteDistillConfig
from pte_trl.training.distill.divergence import divergence
from pte_trl.training.distill.policies import evictions_seen, hidden_states
from pte_trl.training.generation import trainer_rollout
from pte_trl.training.micro_batches import prepared_by_window
from pte_trl.training.mixin import BoundedTrainer
from pte_trl.training.schedules import schedules_for


class PteDistillationTrainer(BoundedTrainer, DistillationTrainer):
    """Takes what `DistillationTrainer` takes but a teacher, with a `PteDistillConfig`; the model must have an adapter.

        trainer = PteDistillationTrainer(
            model="Qwen/Qwen2.5-3B-Instruct",  # or a folder, or a model
            args=PteDistillConfig(output_dir="outputs/distilled", window=512),
            train_dataset=dataset,
            peft_config=PteConfig(),
        )
        trainer.train()

    A dataset with a column `completion_ids` (token ids, end included) is distilled on these: a teacher's completions
    that were sampled once, or any text. Without one they are sampled, from the teacher or (`on_policy`) the student.
    What is checked and when training starts: `BoundedTrainer`.

    Raises:
        ValueError: from the constructor, before weights load: settings, a model, an adapter or data that do not fit.
    """

    args: PteDistillConfig
    config_class = PteDistillConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._given: list[list[int]] | None = None  # completions that the dataset brings
        self._schedules: list[Schedule] = []
        self._sums: dict[str, tuple[Tensor, Tensor]] = {}

    # ---- completions ---------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs) -> list[list[int]]:
        self._schedules = schedules_for(self, prompt_ids, completion_ids=self._given)
        self._record_windows(self._schedules)
        if self._given is not None:
            return [ids[: self.max_completion_length] for ids in self._given]
        if self.args.on_policy:
            result = trainer_rollout(self, prompt_ids, self.args.cache_policy, self._schedules)
        else:
            result = trainer_rollout(self, prompt_ids, FULL_CACHE, base=True)
        self._record("rollout/tokens_per_second", result.tokens_per_second)
        return result.completion_ids

    def _generate_and_score_completions(self, inputs):
        self._given = [row["completion_ids"] for row in inputs] if "completion_ids" in inputs[0] else None
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]
        # As GRPO does: the rows are shuffled and split before the loss, so what the replay needs travels with them.
        output["schedules"] = packed(self._schedules).to(mask.device)
        output["evictions"] = evictions_seen(mask.shape[1], self._schedules).to(mask.device)
        output["distilled"] = mask.bool()
        if self.args.distilled_tokens == "after_eviction":
            output["distilled"] &= output["evictions"] > 0
            output["num_items_in_batch"] = self.accelerator.gather(output["distilled"].sum()).sum()
        return output

    def _prepare_inputs(self, generation_batch):
        return prepared_by_window(self, super()._prepare_inputs, generation_batch)

    # ---- loss ----------------------------------------------------------------------------------------------

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        """The mean divergence over the distilled tokens of the whole batch; TRL calls it inside the wrapper."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        prompt, real = inputs["prompt_ids"].shape[1], inputs["completion_mask"].bool()
        states = hidden_states(unwrapped_student, ids, mask, prompt, unpacked(inputs["schedules"]))
        student, teacher = (x[real] for x in states)
        found = divergence(
            student, teacher, unwrapped_student.get_output_embeddings(), self.args.beta, self.temperature
        )
        distilled, late = inputs["distilled"][real], inputs["evictions"][real] > 0
        counted = distilled.sum()
        whole = counted.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        evictions = (inputs["evictions"] * real).amax(1).sum()
        self._sums = {
            "kl": (found.kl.sum(), real.sum()),
            "kl_after_eviction": (found.kl[late].sum(), late.sum()),
            "top1_agreement": (found.agrees.sum(), real.sum()),
            "top1_agreement_after_eviction": (found.agrees[late].sum(), late.sum()),
            "rollout/evictions": (evictions, torch.tensor(len(real), device=ids.device)),
        }
        # One product: every rank has a graph, also where it has no token to distil.
        return (found.loss * distilled).sum() / whole, found.entropy[distilled].sum(), counted

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        self._record_means(self._sums)  # outside of the wrapper, where processes may wait for each other
        self._record_updates(model)
        return loss
