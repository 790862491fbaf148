"""GRPO under a bounded cache, with Progressive Thought Encoding, LoRA-c or LoRA.

The command is `recipes/grpo_pte.py`.
"""

from pte_trl.rewards.functions import AccuracyReward, FormatReward
from pte_trl.rewards.grader import Grader
from pte_trl.runtime.efficiency import EfficiencyCallback
from pte_trl.runtime.entry import framed, settings_checked
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.run import load_data, train
from pte_trl.training.trainer import PteGRPOTrainer


@framed
def main(argv: list[str] | None = None) -> PteGRPOTrainer | None:
    """Trains; returns the trainer, None where the run is finished already."""
    with settings_checked():
        script, args = parse_recipe(argv)
        grader = Grader(script.grader_workers, script.grader_time_limit, answer_after=script.answer_after)
    rewards = [AccuracyReward(grader)]
    if script.format_reward_weight:
        rewards.append(FormatReward(script.answer_after))
        args.reward_weights = [1.0, script.format_reward_weight]
    return train(
        script,
        args,
        PteGRPOTrainer,
        lambda tokenizer: load_data(script, args, tokenizer, grader),
        lambda _: {"reward_funcs": rewards, "callbacks": [EfficiencyCallback()]},
    )
