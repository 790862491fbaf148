"""Cache distillation on TRL's `DistillationTrainer`: the bounded policy learns to be the full-cache policy.

The teacher is the base model with the full cache, the student the same weights with the adapter, under the window, by
the one-pass replay. The signal is dense, needs no gold answers, and what is saved is where GRPO starts.

What serves from TRL: prompts and their tokenizing, generation batches and their split into micro-batches, the loss's
route through the engine's wrapper, logging, saving. `GKDTrainer` would hold both models' logits whole and starts from
written answers; `GOLDTrainer` is for two tokenizers. Replaced are: who writes the completions, and the loss, since
TRL's wants a second model as the teacher and its student sees the full cache.
"""

import torch
from torch import Tensor
from trl import DistillationTrainer

from pte_trl.adapter.model import pte_layers
from pte_trl.cache.schedule import resolve_window
from pte_trl.compat.trl import metrics_of
from pte_trl.rollouts.batching import EngineCache
from pte_trl.runtime.checkpoints import AtomicCheckpoints
from pte_trl.runtime.sharding import prepare_engine
from pte_trl.training.distill.config import PteDistillConfig
from pte_trl.training.distill.divergence import divergence
from pte_trl.training.distill.policies import evictions_seen, hidden_states
from pte_trl.training.generation import trainer_rollout
from pte_trl.training.unsupported import check_arguments


class PteDistillationTrainer(AtomicCheckpoints, DistillationTrainer):
    """Takes what `DistillationTrainer` takes but a teacher, with a `PteDistillConfig`; the model must have an adapter.

    A dataset with a column `completion_ids` (token ids, end included) is distilled on these: a teacher's completions
    that were sampled once, or any text. Without one they are sampled, from the teacher or (`on_policy`) the student.
    """

    args: PteDistillConfig

    def __init__(self, *args, **kwargs):
        check_arguments(DistillationTrainer, PteDistillConfig, args, kwargs)
        super().__init__(*args, **kwargs)
        self.engine_cache = EngineCache()
        self._given: list[list[int]] | None = None  # completions that the dataset brings
        self._window = 0
        self._sums: dict[str, Tensor] = {}
        for layer in pte_layers(self.model):
            layer.watch_updates = True
        prepare_engine(self)

    # ---- completions ---------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, *args, **kwargs) -> list[list[int]]:
        self._window = resolve_window(self.args.window, self.args.budget, max(map(len, prompt_ids)))
        if self._given is not None:
            return [ids[: self.max_completion_length] for ids in self._given]
        on_policy = self.args.on_policy
        window = self._window if on_policy else self.max_completion_length
        result = trainer_rollout(self, prompt_ids, window, base=not on_policy)
        metrics_of(self)["rollout/tokens_per_second"].append(result.tokens_per_second)
        return result.completion_ids

    def _generate_and_score_completions(self, inputs):
        self._given = [row["completion_ids"] for row in inputs] if "completion_ids" in inputs[0] else None
        output = super()._generate_and_score_completions(inputs)
        mask = output["completion_mask"]
        # As GRPO does: the rows are shuffled and split before the loss, so what the replay needs travels with them.
        output["windows"] = torch.full((len(inputs),), self._window, device=mask.device)
        output["evictions"] = evictions_seen(mask.shape[1], output["windows"], self.args.evict_ratio)
        output["distilled"] = mask.bool()
        if self.args.distilled_tokens == "after_eviction":
            output["distilled"] &= output["evictions"] > 0
            output["num_items_in_batch"] = self.accelerator.gather(output["distilled"].sum()).sum()
        return output

    # ---- loss ----------------------------------------------------------------------------------------------

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        """The mean divergence over the distilled tokens of the whole batch; TRL calls it inside the wrapper."""
        ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
        mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
        prompt, real = inputs["prompt_ids"].shape[1], inputs["completion_mask"].bool()
        states = hidden_states(unwrapped_student, ids, mask, prompt, inputs["windows"], self.args.evict_ratio)
        student, teacher = (x[real] for x in states)
        found = divergence(
            student, teacher, unwrapped_student.get_output_embeddings(), self.args.beta, self.temperature
        )
        distilled, late = inputs["distilled"][real], inputs["evictions"][real] > 0
        counted = distilled.sum()
        whole = counted.clamp(min=1) if num_items_in_batch is None else num_items_in_batch
        evictions = (inputs["evictions"] * real).amax(1).sum()
        pairs = {
            "kl": (found.kl.sum(), real.sum()),
            "kl_after_eviction": (found.kl[late].sum(), late.sum()),
            "top1_agreement": (found.agrees.sum(), real.sum()),
            "top1_agreement_after_eviction": (found.agrees[late].sum(), late.sum()),
            "rollout/evictions": (evictions, torch.tensor(len(real), device=ids.device)),
        }
        self._sums = {name: torch.stack([total.float(), count.float()]) for name, (total, count) in pairs.items()}
        # One product: every rank has a graph, also where it has no token to distil.
        return (found.loss * distilled).sum() / whole, found.entropy[distilled].sum(), counted

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        metrics = metrics_of(self)
        for name, pair in self._sums.items():  # outside of the wrapper, where processes may wait for each other
            total, count = self.accelerator.gather(pair.unsqueeze(0)).sum(0).tolist()
            metrics[name].append(total / count if count else float("nan"))  # TRL leaves NaN out of its means
        layers = pte_layers(self.accelerator.unwrap_model(model))
        if layers:  # on every process alike; a batch without an eviction has no ratio
            ratios = [torch.tensor(float("nan")) if x.update_ratio is None else x.update_ratio for x in layers]
            ratio = torch.stack([r.to(self.accelerator.device) for r in ratios]).mean()
            metrics["pte/update_over_state"].append(self.accelerator.gather(ratio).nanmean().item())
        return loss
