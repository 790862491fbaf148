"""Where GRPO stops at a number that is not finite: in the rollout, in the scoring, in the gradient."""

import math
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from pte_trl.compat.trl import is_async_callable
from pte_trl.runtime.faults import Fault
from pte_trl.runtime.finite import FiniteReward, check_finite, samples_without_gradient, tail


class FiniteGrpo:
    """Methods of a GRPO trainer that name step, rank and sample of a NaN or an infinity.

    Attributes:
        _micro_batches: those of the optimizer step that is under way.
    """

    _micro_batches: list[dict]

    def _check_rewards(self) -> None:
        """From now on a reward that is not finite ends the run; reward models and async functions are left alone."""
        self.reward_funcs = [
            f if isinstance(f, nn.Module) or is_async_callable(f) else FiniteReward(f, self.args.process_index)
            for f in self.reward_funcs
        ]

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
