"""GRPO under a bounded cache (eq. 3): TRL's trainer, with its generating and its scoring method replaced.

The rollout decodes with a window; scoring replays the same windows, so that the loss sees exactly the log-probs that
the completions were sampled under. W travels with every sample, since TRL shuffles and splits a rollout batch before
it is scored. The reference model of the KL term is the base with the full cache: TRL's own method, untouched.
"""

import math
from contextlib import contextmanager

import torch
from accelerate.logging import get_logger
from torch import Tensor, nn
from trl import GRPOTrainer

from pte_trl.adapter.fit import FAMILIES
from pte_trl.adapter.model import adapters_disabled, pte_layers
from pte_trl.cache.schedule import Schedule, resolve_window
from pte_trl.compat.trl import distributed_backend, is_async_callable, metrics_of
from pte_trl.replay.plan import replay_inputs
from pte_trl.replay.segments import segment_logps
from pte_trl.rewards.grader import has_boxed
from pte_trl.rollouts.batching import EngineCache
from pte_trl.runtime.checkpoints import AtomicCheckpoints
from pte_trl.runtime.efficiency import TFLOPS_METRIC, attention_tflops, visible_pairs
from pte_trl.runtime.faults import Fault
from pte_trl.runtime.finite import FiniteReward, check_finite, samples_without_gradient, tail
from pte_trl.runtime.sharding import call_inside, check_engine, prepare_engine
from pte_trl.training.config import PteGRPOConfig
from pte_trl.training.generation import trainer_rollout
from pte_trl.training.unsupported import check_arguments

logger = get_logger(__name__)


class PteGRPOTrainer(AtomicCheckpoints, GRPOTrainer):
    """`GRPOTrainer` whose rollouts and scoring run under cache policy D.

    Takes what `GRPOTrainer` takes, with a `PteGRPOConfig`. `method="lora"` is TRL untouched; `lora_c` and `pte` differ
    only in the adapter, given as `peft_config` or as a model that has one.
    """

    args: PteGRPOConfig
    answer_after: str | None = None  # the format rate counts boxes behind it only, as the rewards do

    def __init__(self, *args, **kwargs):
        check_arguments(GRPOTrainer, PteGRPOConfig, args, kwargs)
        super().__init__(*args, **kwargs)
        self.engine_cache = EngineCache()
        self._samples: dict[str, Tensor] = {}  # what is known of the samples about to be scored, W above all
        self._micro_batches: list[dict] = []  # those of the optimizer step that is under way
        self.reward_funcs = [
            f if isinstance(f, nn.Module) or is_async_callable(f) else FiniteReward(f, self.args.process_index)
            for f in self.reward_funcs
        ]
        if self.bounded and "ref" in getattr(self.model, "peft_config", {}):
            # TRL would take the adapter that training starts from as the reference; eq. 3 takes the base model.
            self.model.delete_adapter("ref")
        for layer in pte_layers(self.model):
            layer.watch_updates = True
        self._check_dropout()
        backend = distributed_backend(self)
        zero, fsdp = backend.zero_stage, backend.fsdp_version
        check_engine(self.args, f"ZeRO-{zero}" if zero else f"FSDP{fsdp}" if fsdp else None)
        prepare_engine(self)

    @property
    def bounded(self) -> bool:
        return self.args.method != "lora"

    def _check_dropout(self) -> None:
        """Segment-wise scoring runs the model again inside backward, where nothing may be random.

        In one pass a dropout of the user's stands, but training then is not on the log-probs that were sampled.
        """
        random = [
            f"{name}{'' if isinstance(module, nn.Dropout) else '.attention_dropout'}"
            for name, module in self.model.named_modules()
            if (module.p if isinstance(module, nn.Dropout) else getattr(module, "attention_dropout", 0))
        ]
        if random and self.args.replay == "segments":
            raise ValueError(
                f"replay='segments': dropout in {random[0]} would differ between the two passes; set it to 0"
            )
        if random and self.bounded:
            logger.warning(
                "dropout in %d modules, first %s: log-probs in training differ from the sampled ones (mismatch/mean); "
                "with 0 they agree",
                len(random),
                random[0],
            )

    # ---- rollout -------------------------------------------------------------------------------------------

    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        if not self.bounded:
            with self._finite_logits(prompt_ids):
                return super()._generate_single_turn(
                    prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs
                )
        window = resolve_window(self.args.window, self.args.budget, max(map(len, prompt_ids)))
        result = trainer_rollout(self, prompt_ids, window)
        self._check_rollout(result.logprobs, prompt_ids)
        self._samples = {"windows": torch.full((len(prompt_ids),), window, device=self.accelerator.device)}
        self._record("rollout/window", window)
        self._record("rollout/evictions", sum(result.evictions) / len(result.evictions))
        self._record("rollout/tokens_per_second", result.tokens_per_second)
        self._record("rollout/cache_bytes_per_sample", result.cache_bytes)
        return result.completion_ids, result.logprobs

    def _generate_and_score_completions(self, inputs):
        output = super()._generate_and_score_completions(inputs)
        texts = self.processing_class.batch_decode(
            [ids[keep.bool()] for ids, keep in zip(output["completion_ids"], output["completion_mask"], strict=True)],
            skip_special_tokens=True,
        )
        self._record("completions/format_rate", sum(has_boxed(t, self.answer_after) for t in texts) / len(texts))
        self._warn_without_signal()
        self._record_attention(output["prompt_mask"], output["completion_mask"])
        if self.bounded:
            output.update(self._samples)
            if "old_per_token_logps" in output:
                self._record_mismatch(output["old_per_token_logps"], output)
        return output

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
        logps, entropies = [], []
        for rows in torch.arange(len(input_ids), device=input_ids.device).split(batch_size or len(input_ids)):
            ids, mask, windows = input_ids[rows], attention_mask[rows], self._samples["windows"][rows]
            some_logps, some_entropies = self._score(model, ids, mask, prompt, windows)
            logps.append(some_logps)
            entropies.append(some_entropies)
        logps = torch.cat(logps)
        self._check_logps(logps, input_ids, attention_mask)
        # Inside `_compute_loss` without old log-probs the weights are still those of the rollout.
        if "sampling_per_token_logps" in self._samples and "old_per_token_logps" not in self._samples:
            self._record_mismatch(logps, self._samples)
        return logps, torch.cat(entropies) if compute_entropy else None, None

    def _score(self, model, ids: Tensor, mask: Tensor, prompt: int, windows: Tensor) -> tuple[Tensor, Tensor]:
        """(batch, completion) log-probs and entropies, by one forward or segment by segment."""
        unwrapped, ratio = self.accelerator.unwrap_model(model), self.args.evict_ratio
        with self.accelerator.autocast():
            if self.args.replay == "segments":
                options = {"segment_length": self.args.segment_length, "offload": self.args.offload_cache}

                def segments(input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, Tensor]:
                    return segment_logps(unwrapped, input_ids, attention_mask, prompt, windows, ratio, **options)

                return call_inside(model, unwrapped, segments, input_ids=ids, attention_mask=mask)
            labels = ids.masked_fill(mask == 0, -100)
            labels[:, :prompt] = -100
            inputs = replay_inputs(unwrapped, mask, prompt, windows, ratio)
            outputs = model(input_ids=ids, labels=labels, fused_lm_head=True, **inputs)
        return outputs.log_probs[:, prompt - 1 :], outputs.entropy[:, prompt - 1 :]

    def _compute_loss(self, model, inputs):
        self._samples = inputs
        if self.model.training:
            self._micro_batches.append(inputs)
        loss = super()._compute_loss(model, inputs)
        layers = pte_layers(self.accelerator.unwrap_model(model))
        if layers:  # no evictions on this process, perhaps, but all of them take part in the mean
            ratios = [layer.update_ratio for layer in layers if layer.update_ratio is not None]
            self._record("pte/update_over_state", torch.stack(ratios).mean() if ratios else float("nan"))
        return loss

    # ---- what is not finite --------------------------------------------------------------------------------

    @property
    def _place(self) -> str:
        return f"step {self.state.global_step + 1}, rank {self.args.process_index}"

    def _check_rollout(self, logprobs: list[list[float]], prompt_ids: list[list[int]]) -> None:
        sums = torch.tensor([[sum(row)] for row in logprobs])  # of numbers below 0: finite only if all are
        check_finite("log-probs of the rollout", sums, self._place, lambda i: self._sample_name(i, prompt_ids[i]))

    @contextmanager
    def _finite_logits(self, prompt_ids: list[list[int]]):
        """Gives torch's refusal to sample from a NaN, in a rollout of TRL's, a place and a sample."""
        try:
            yield
        except RuntimeError as error:
            if "probability tensor contains" not in str(error):
                raise
            if self.is_deepspeed_enabled or self.is_fsdp_enabled:  # weights may be on other ranks
                raise Fault(f"{self._place}: logits of the rollout are not finite") from error
            with torch.no_grad():
                for index, ids in enumerate(prompt_ids):
                    logits = self.model(torch.tensor([ids], device=self.accelerator.device)).logits
                    if not torch.isfinite(logits).all():
                        name = self._sample_name(index, ids)
                        raise Fault(f"{self._place}: logits of the rollout are not finite, first in {name}") from error
            raise Fault(f"{self._place}: logits of the rollout are not finite, though the prompts' are") from error

    def _check_logps(self, logps: Tensor, ids: Tensor, mask: Tensor) -> None:
        prompt = ids.shape[1] - logps.shape[1]
        kept = logps.detach().masked_fill(mask[:, prompt:] == 0, 0.0)
        check_finite(
            "log-probs", kept, self._place, lambda i: self._sample_name(i, ids[i, :prompt][mask[i, :prompt] != 0])
        )

    def _sample_name(self, index: int, prompt_ids: Tensor | list[int]) -> str:
        return f"sample {index}, prompt {tail(self.processing_class.decode(prompt_ids))}"

    def _get_grad_norm(self, model, grad_norm=None):
        """Stops before the optimizer steps along a gradient that is not finite (with DeepSpeed: right after)."""
        norm = super()._get_grad_norm(model, grad_norm)
        value = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if self.accelerator.scaler is None and value is not None and not math.isfinite(value):
            raise Fault(f"{self._place}: the norm of the gradient is {float(value)}; {self._blame()}")
        self._micro_batches.clear()
        return norm

    def _blame(self) -> str:
        """Which of this rank's samples have a gradient that is not finite: each is differentiated alone."""
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            return "which sample it comes from is not known under ZeRO and FSDP"
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for inputs in list(self._micro_batches):
            rows = [
                {k: v[i : i + 1] if torch.is_tensor(v) and v.dim() else v for k, v in inputs.items()}
                for i in range(len(inputs["prompt_ids"]))
            ]
            bad = samples_without_gradient(lambda i: self._compute_loss(self.model, rows[i]), len(rows), parameters)  # noqa: B023
            if bad:
                first = inputs["prompt_ids"][bad[0]][inputs["prompt_mask"][bad[0]].bool()]
                return f"it comes from {len(bad)} of {len(rows)} samples, first {self._sample_name(bad[0], first)}"
        return "none of this rank's samples has such a gradient alone"

    # ---- what is logged ------------------------------------------------------------------------------------

    def _record(self, name: str, value: float | Tensor) -> None:
        """One number of this process -> the mean over processes, averaged by TRL over a logging step.

        NaN is no number, and nothing is recorded where no process has one.
        """
        value = self.accelerator.gather(torch.as_tensor(float(value), device=self.accelerator.device))
        if not value.isnan().all():
            metrics_of(self)[name].append(value.nanmean().item())

    def _record_max(self, name: str, value: float | Tensor) -> None:
        """The largest over processes and over the logging step: TRL averages a list, so the list keeps one number.

        NaN is no number here, either.
        """
        found = self.accelerator.gather(torch.as_tensor(float(value), device=self.accelerator.device)).flatten()
        metrics, numbers = metrics_of(self), found[~found.isnan()].tolist()
        if numbers:
            metrics[name] = [max(numbers + metrics[name])]

    @torch.no_grad()
    def _record_mismatch(self, replayed: Tensor, samples: dict[str, Tensor]) -> None:
        """|replay - rollout| of the log-probs of the same tokens under the same weights; 0 but for rounding.

        The KL is the non-negative estimate exp(d) - d - 1 with d = replay - rollout, as TRL's.
        """
        d = (replayed - samples["sampling_per_token_logps"])[samples["completion_mask"].bool()].double()
        # Of no token, where `mask_truncated_completions` leaves none, the mean is NaN: this process has no number.
        self._record("mismatch/mean", d.abs().mean())
        self._record("mismatch/kl", (d.exp() - d - 1).mean())
        self._record_max("mismatch/max", d.abs().max() if d.numel() else math.nan)

    def _record_attention(self, prompt_mask: Tensor, completion_mask: Tensor) -> None:
        """TFLOPs of attention that the costliest sample's forward needs, of families whose shape we know."""
        config = self.accelerator.unwrap_model(self.model).config
        if config.model_type not in FAMILIES:  # `lora` trains any
            return
        lengths = zip(prompt_mask.sum(1).tolist(), completion_mask.sum(1).tolist(), strict=True)
        windows = self._samples["windows"].tolist() if self.bounded else [None] * len(prompt_mask)
        pairs = [
            visible_pairs(prompt, completion, None if window is None else Schedule(window, self.args.evict_ratio))
            for (prompt, completion), window in zip(lengths, windows, strict=True)
        ]
        self._record_max(TFLOPS_METRIC, attention_tflops(config, max(pairs)))

    def _warn_without_signal(self) -> None:
        """Says aloud that a rollout batch teaches nothing, instead of a silent zero gradient."""
        metrics = metrics_of(self)
        if metrics["frac_reward_zero_std"][-1] == 1.0:
            logger.warning(
                "step %d: every group has zero reward spread (mean reward %.3f), so this batch has no gradient; "
                "the task is too hard or too easy for the policy, or completions are cut (truncated share %.2f)",
                self.state.global_step,
                metrics["reward"][-1],
                metrics["completions/clipped_ratio"][-1],
            )
        elif metrics["completions/clipped_ratio"][-1] == 1.0:
            logger.warning(
                "step %d: every completion was cut at max_completion_length=%d",
                self.state.global_step,
                self.max_completion_length,
            )
