"""GRPO on a task of memory: the thought up to the question is given, the policy writes the answer, one token.

    python -m experiments.study.grpo --config recipes/study/recall_grpo.yaml --method pte --seed 0 --output_dir OUT
    python -m experiments.study.grpo --config recipes/study/names_grpo.yaml --adapter ADAPTER --output_dir OUT

If the policy wrote what it is asked for later, always writing the same would be rewarded. So the thought comes from
the data, as the base model would have drawn it; the loss is on the answer alone. The log-probs of all completions are
taken from one replay, which is what a decode gives (tests/test_exactness.py).
"""

import torch

from pte_trl.cache.schedule import packed
from pte_trl.compat.trl import pad
from pte_trl.data.problems import load_problems
from pte_trl.replay.plan import replay_inputs
from pte_trl.rollouts.prompts import left_pad
from pte_trl.rollouts.rollout import eval_mode
from pte_trl.runtime.entry import framed, run, settings_checked
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.run import train
from pte_trl.training.schedules import schedules_for
from pte_trl.training.trainer import PteGRPOTrainer


class GivenThoughtTrainer(PteGRPOTrainer):
    """`PteGRPOTrainer` for rows with a thought: a completion is the thought, one sampled token, and the end."""

    def _generate_and_score_completions(self, inputs):
        self._thoughts = self.processing_class([row["thought"] for row in inputs])["input_ids"]
        output = super()._generate_and_score_completions(inputs)
        # TRL's mask of tokens that the policy did not write: here all but the last but one.
        ends = output["completion_mask"].sum(1, keepdim=True)
        at = torch.arange(output["completion_mask"].shape[1], device=ends.device)
        output["tool_mask"] = (at == ends - 2).to(output["completion_mask"].dtype)
        return output

    def _record_mismatch(self, replayed, samples):
        written = samples["completion_mask"] * samples["tool_mask"]  # the end is not sampled, and has no log-prob
        super()._record_mismatch(replayed, samples | {"completion_mask": written})

    @torch.no_grad()
    def _generate_single_turn(self, prompt_ids, images, multimodal_fields, num_generations, *args, **kwargs):
        model, device, end = self.accelerator.unwrap_model(self.model), self.accelerator.device, self.eos_token_ids[0]
        prompts, prompt_mask = left_pad(prompt_ids, self.processing_class.pad_token_id, device)
        thoughts = [torch.tensor([*thought, end], device=device) for thought in self._thoughts]
        ids = torch.cat([prompts, pad(thoughts, self.processing_class.pad_token_id, "right")], dim=1)
        mask = torch.cat([prompt_mask, pad([torch.ones_like(t) for t in thoughts], 0, "right")], dim=1)
        inputs = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0), "use_cache": False}
        if self.bounded:
            schedules = schedules_for(self, prompt_ids, num_generations)
            inputs = replay_inputs(model, mask, prompts.shape[1], schedules)
            self._samples = {"schedules": packed(schedules).to(device)}
        with eval_mode(model):
            logits = model(input_ids=ids, **inputs).logits[:, prompts.shape[1] - 1 : -1]
        logps = (logits / self.temperature).log_softmax(-1)
        completions, sampled = [], []
        for thought, row in zip(thoughts, logps, strict=True):
            at = len(thought) - 1  # the place of the answer
            answer = torch.multinomial(row[at].exp(), 1)
            completion = torch.cat([thought[:-1], answer])
            sampled.append([*row.gather(1, completion.unsqueeze(1)).squeeze(1).tolist(), 0.0])
            completions.append([*completion.tolist(), end])
        return completions, sampled


class RightAnswer:
    """1 where the token before the end is the answer, with or without a space before it; 0 for any other."""

    __name__ = "right_answer"

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __call__(self, completion_ids, answer, **kwargs) -> list[float]:
        written = (self.tokenizer.decode(ids[-2]).strip() for ids in completion_ids)
        return [float(word == gold) for word, gold in zip(written, answer, strict=True)]


@framed
def main(argv: list[str] | None = None) -> GivenThoughtTrainer | None:
    with settings_checked():
        script, args = parse_recipe(argv)

    def read(_):
        # The column thought: see experiments.study.recall.
        data = load_problems(script.dataset_name, limit=script.dataset_limit, keep=["thought"])
        return data.rename_column("problem", "prompt")

    return train(script, args, GivenThoughtTrainer, read, lambda tokenizer: {"reward_funcs": RightAnswer(tokenizer)})


if __name__ == "__main__":
    run(main)
