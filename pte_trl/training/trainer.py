"""GRPO under a bounded cache (eq. 3): TRL's trainer, with its generating and its scoring method replaced.

The rollout decodes with a window; scoring replays the same windows, so that the loss sees exactly the log-probs that
the completions were sampled under. W and E travel with every sample, since TRL shuffles and splits a rollout batch
before it is scored. The reference model of the KL term is the base with the full cache: TRL's own method, untouched.
"""

from contextlib import nullcontext

import torch
from accelerate.logging import get_logger
from torch import Tensor
from trl import GRPOTrainer

from pte_trl.adapter.model import adapters_disabled
from pte_trl.adapter.self_test import check_segments
from pte_trl.cache.schedule import Schedule, packed, unpacked
from pte_trl.replay.plan import replay_inputs
from pte_trl.replay.segments import segment_logps
from pte_trl.rewards.grader import has_boxed
from pte_trl.runtime.lockstep import lockstep_of
from pte_trl.runtime.sharding import call_inside
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.finite import FiniteGrpo
from pte_trl.training.generation import trainer_rollout
from pte_trl.training.metrics import GrpoMetrics, sampled_tokens
from pte_trl.training.micro_batches import prepared_by_window
from pte_trl.training.mixin import BoundedTrainer
from pte_trl.training.replays import check_dropout, dropouts, settled, stated, step_beside_engine
from pte_trl.training.router import seeing
from pte_trl.training.schedules import schedules_for

logger = get_logger(__name__)


class PteGRPOTrainer(GrpoMetrics, FiniteGrpo, BoundedTrainer, GRPOTrainer):
    """`GRPOTrainer` whose rollouts and scoring run under a bounded KV cache (eq. 3).

        trainer = PteGRPOTrainer(
            model="Qwen/Qwen2.5-3B-Instruct",  # or a folder, or a model
            reward_funcs=AccuracyReward(),
            args=PteGRPOConfig(output_dir="outputs/pte", window=512),
            train_dataset=dataset,
            peft_config=PteConfig(),
        )
        trainer.train()

    Takes what `GRPOTrainer` takes, with a `PteGRPOConfig`. `method="lora"` is TRL untouched; `lora_c` and `pte` differ
    only in the adapter, given as `peft_config` or as a model that has one. What is checked and when training starts:
    `BoundedTrainer`.

    Raises:
        ValueError: from the constructor, before weights load: settings, a model, an adapter or data that do not fit.
        Fault: from `train`, naming step, rank and sample: a log-prob, reward or gradient that is not finite.
    """

    args: PteGRPOConfig
    config_class = PteGRPOConfig

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._samples: dict[str, Tensor] = {}  # what is known of the samples about to be scored
        self._micro_batches = []
        # The format rate counts boxes after it only, as the rewards do.
        texts = (getattr(getattr(f, "grader", f), "answer_after", None) for f in self.reward_funcs)
        self.answer_after: str | None = next(filter(None, texts), None)
        self._check_rewards()
        if self.bounded and "ref" in getattr(self.model, "peft_config", {}):
            # TRL would take the adapter that training starts from as the reference; eq. 3 takes the base model.
            self.model.delete_adapter("ref")
        self.replay = stated(self.args)
        if self.replay.kind == "segments":
            check_segments(self.model.config)
            check_dropout(self.model)
        # In one pass a dropout of the user's stands, but training then is not on the log-probs that were sampled.
        if self.bounded and (random := dropouts(self.model)):
            logger.warning(
                "dropout in %d modules, first %s: log-probs in training differ from the sampled ones (mismatch/mean); "
                "with 0 they agree",
                len(random),
                random[0],
            )

    def _settle(self, longest_prompt: int | None) -> None:
        self.replay = settled(self, longest_prompt)
        self.step_beside_engine = step_beside_engine(self, longest_prompt)
        if self.bounded:
            self.settings = self.settings | {"replay_chosen": str(self.replay)}

    # ---- rollout -------------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        if not self.bounded:
            with self._finite_logits(prompt_ids):
                return super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
                )
        # One W for all completions of a prompt, since their rewards are compared.
        schedules = schedules_for(self, prompt_ids, num_generations)
        result = trainer_rollout(self, prompt_ids, self.args.cache_policy, schedules)
        self._check_rollout(result.logprobs, prompt_ids)
        self._samples = {"schedules": packed(result.schedules).to(self.accelerator.device)}
        self._record_rollout(result)
        return result.completion_ids, result.logprobs

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        sampled = sampled_tokens(output, self.processing_class.pad_token_id)
        texts = self.processing_class.batch_decode(
            [ids[keep] for ids, keep in zip(output["completion_ids"], sampled, strict=True)], skip_special_tokens=True
        )
        self._record("completions/format_rate", sum(has_boxed(t, self.answer_after) for t in texts) / len(texts))
        self._warn_without_signal()
        self._record_attention(output["prompt_mask"], sampled)
        if self.bounded:
            output.update(self._samples)
            if "old_per_token_logps" in output:
                self._record_mismatch(output["old_per_token_logps"], output)
        return output

    def _prepare_inputs(self, generation_batch):
        return prepared_by_window(self, super()._prepare_inputs, generation_batch)

    # ---- scoring -------------------------------------------------------------------------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model,
        input_ids,
        attention_mask,
        logits_to_keep,
        batch_size=None,
        compute_entropy=False,
        compute_aux_loss=False,
        **kwargs,
    ):
        if not self.bounded or adapters_disabled(self.accelerator.unwrap_model(model)):
            if self.replay.kind == "segments":
                batch_size = 1  # of the reference model; its forward over whole texts would be the larger memory
            found = super()._get_per_token_logps_and_entropies(
                model,
                input_ids,
                attention_mask,
                logits_to_keep,
                batch_size=batch_size,
                compute_entropy=compute_entropy,
                compute_aux_loss=compute_aux_loss,
                **kwargs,
            )
            self._check_logps(found[0], input_ids, attention_mask)
            return found
        prompt = input_ids.shape[1] - logits_to_keep
        logps, entropies, losses = [], [], []
        for rows in torch.arange(len(input_ids), device=input_ids.device).split(batch_size or len(input_ids)):
            ids, mask, schedules = input_ids[rows], attention_mask[rows], unpacked(self._samples["schedules"][rows])
            some_logps, some_entropies, loss = self._score(model, ids, mask, prompt, schedules, compute_aux_loss)
            logps.append(some_logps)
            entropies.append(some_entropies)
            losses.append(loss)
        logps = torch.cat(logps)
        self._check_logps(logps, input_ids, attention_mask)
        # Inside `_compute_loss` without old log-probs the weights are still those of the rollout.
        if "sampling_per_token_logps" in self._samples and "old_per_token_logps" not in self._samples:
            self._record_mismatch(logps, self._samples)
        aux_loss = torch.stack(losses).mean() if compute_aux_loss else None
        return logps, torch.cat(entropies) if compute_entropy else None, aux_loss

    def _score(
        self, model, ids: Tensor, mask: Tensor, prompt: int, schedules: list[Schedule], balance: bool
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(batch, completion) log-probs and entropies, by one forward or segment by segment.

        With `balance` the load-balancing loss of a mixture of experts as well, which one forward alone can give.
        """
        unwrapped = self.accelerator.unwrap_model(model)
        with self.accelerator.autocast():
            if self.replay.kind == "segments":
                options = {"segment_length": self.args.segment_length, "offload": self.replay.offload}
                options["lockstep"] = lockstep_of(model)

                def segments(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
                    return segment_logps(unwrapped, input_ids, attention_mask, prompt, schedules, **options)

                return (*call_inside(model, unwrapped, segments, input_ids=ids, attention_mask=mask), None)
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :prompt] = -100
            inputs = replay_inputs(unwrapped, mask, prompt, schedules)
            seen = nullcontext()
            if balance:
                seen = seeing(unwrapped.get_base_model(), inputs["attention_mask"])
                inputs |= {"attention_mask": mask, "output_router_logits": True}
            with seen:
                outputs = model(input_ids=ids, labels=labels, fused_lm_head=True, **inputs)
        return outputs.log_probs[:, prompt - 1 :], outputs.entropy[:, prompt - 1 :], outputs.aux_loss

    def _compute_loss(self, model, inputs):
        self._samples = inputs
        if self.model.training:
            self._micro_batches.append(inputs)
        loss = super()._compute_loss(model, inputs)
        self._record_updates(model)
        return loss
