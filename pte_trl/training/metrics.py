"""What the trainers log in addition to TRL's own metrics."""

import math
from collections.abc import Callable

import torch
from accelerate.logging import get_logger
from torch import Tensor

from pte_trl.adapter.model import pte_layers
from pte_trl.cache.schedule import Schedule, unpacked
from pte_trl.compat.trl import metrics_of
from pte_trl.estimate.shape import NotEstimated
from pte_trl.runtime.efficiency import TFLOPS_METRIC, attention_tflops, visible_pairs

logger = get_logger(__name__)


def sampled_tokens(output: dict[str, Tensor], pad_token_id: int) -> Tensor:
    """(batch, completion): where a completion has a token, also one that `mask_truncated_completions` leaves out."""
    mask = output["completion_mask"].bool()
    return torch.where(mask.any(1, keepdim=True), mask, output["completion_ids"] != pad_token_id)


class TrainerMetrics:
    """Methods of a TRL trainer that put numbers among its metrics; TRL averages them over a logging step."""

    def _record(self, name: str, value: float | Tensor) -> None:
        """One number of this process -> the mean over processes.

        NaN is no number, and nothing is recorded where no process has one.
        """
        value = self.accelerator.gather(torch.as_tensor(float(value), device=self.accelerator.device))
        if not value.isnan().all():
            metrics_of(self)[name].append(value.nanmean().item())

    def _record_means(self, sums: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Means over all tokens (or samples) of a logging step, on all processes and in all its micro-batches.

        TRL averages a list with equal weights, but micro-batches have different numbers of tokens. So the list keeps
        one number, the mean so far.

        Args:
            sums: by name the sum of this process's values, and their number; a mean of none is not recorded.
        """
        mode, metrics = self.model.training, metrics_of(self)
        pairs = torch.stack([torch.stack([total.double(), count.double()]) for total, count in sums.values()])
        found = self.accelerator.gather(pairs.unsqueeze(0)).sum(0).tolist()
        for name, pair in zip(sums, found, strict=True):
            # TRL clears its metrics when it logs them.
            before = self._counted[mode, name] if metrics.get(name) else (0.0, 0.0)
            total, count = self._counted[mode, name] = (before[0] + pair[0], before[1] + pair[1])
            if count:
                metrics[name] = [total / count]

    def _record_max(self, name: str, value: float | Tensor, pick: Callable = max) -> None:
        """The largest over processes and over the logging step: TRL averages a list, so the list keeps one number.

        NaN is no number here, either. `pick` is `min` for the smallest.
        """
        found = self.accelerator.gather(torch.as_tensor(float(value), device=self.accelerator.device)).flatten()
        metrics, numbers = metrics_of(self), found[~found.isnan()].tolist()
        if numbers:
            metrics[name] = [pick(numbers + metrics[name])]

    def _record_rollout(self, result) -> None:
        """Window and evictions per completion, speed and memory of a rollout under a bounded cache."""
        self._record_windows(result.schedules)
        self._record("rollout/evictions", sum(result.evictions) / len(result.evictions))
        self._record("rollout/tokens_per_second", result.tokens_per_second)
        self._record("rollout/cache_bytes_per_sample", result.cache_bytes)

    def _record_windows(self, schedules: list[Schedule]) -> None:
        """W, its mean, and where samples have several the smallest and the largest."""
        windows = [schedule.window for schedule in schedules]
        self._record("rollout/window", sum(windows) / len(windows))
        if not isinstance(self.args.window, int):
            self._record_max("rollout/window_min", min(windows), pick=min)
            self._record_max("rollout/window_max", max(windows))

    def _record_updates(self, model) -> None:
        """|S'| / |S| of the last forward, mean over layers; on every process, also one that has seen no eviction."""
        layers = pte_layers(self.accelerator.unwrap_model(model))
        if layers:
            ratios = [layer.update_ratio for layer in layers if layer.update_ratio is not None]
            self._record("pte/update_over_state", torch.stack(ratios).mean() if ratios else float("nan"))


class GrpoMetrics(TrainerMetrics):
    """Of GRPO: whether the replay agrees with the rollout, what attention costs, and batches without a signal."""

    @torch.no_grad()
    def _record_mismatch(self, replayed: Tensor, samples: dict[str, Tensor]) -> None:
        """|replay - rollout| of the log-probs of the same tokens under the same weights; 0 but for rounding.

        The KL is the non-negative estimate exp(d) - d - 1 with d = replay - rollout, as TRL's.
        """
        d = (replayed - samples["sampling_per_token_logps"])[samples["completion_mask"].bool()].double()
        tokens = torch.tensor(d.numel(), device=d.device)  # none where `mask_truncated_completions` leaves none
        self._record_means(
            {"mismatch/mean": (d.abs().sum(), tokens), "mismatch/kl": ((d.exp() - d - 1).sum(), tokens)}
        )
        self._record_max("mismatch/max", d.abs().max() if d.numel() else math.nan)

    def _record_attention(self, prompt_mask: Tensor, completion_mask: Tensor) -> None:
        """TFLOPs of attention that the costliest sample's forward needs, of models whose layers are known."""
        config = self.accelerator.unwrap_model(self.model).config
        lengths = list(zip(prompt_mask.sum(1).tolist(), completion_mask.sum(1).tolist(), strict=True))
        schedules = unpacked(self._samples["schedules"]) if self.bounded else [None] * len(prompt_mask)
        pairs = [visible_pairs(*length, schedule) for length, schedule in zip(lengths, schedules, strict=True)]
        costs = {(each, sum(length)) for each, length in zip(pairs, lengths, strict=True)}
        try:
            found = max(attention_tflops(config, *cost) for cost in costs)
        except NotEstimated:
            return
        self._record_max(TFLOPS_METRIC, found)

    def _warn_without_signal(self) -> None:
        """Warns of a rollout batch that teaches nothing, instead of a silent zero gradient."""
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
