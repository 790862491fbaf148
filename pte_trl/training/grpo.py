"""GRPO under a bounded cache, with Progressive Thought Encoding, LoRA-c or LoRA.

The command is `recipes/grpo_pte.py`.
"""

from pte_trl.data.needs import check_needs
from pte_trl.models.tokens import load_tokenizer
from pte_trl.rewards.functions import AccuracyReward, FormatReward
from pte_trl.rewards.grader import Grader
from pte_trl.runtime.checkpoints import batch_steps
from pte_trl.runtime.efficiency import EfficiencyCallback
from pte_trl.runtime.entry import framed, settings_checked
from pte_trl.runtime.identity import training_identity
from pte_trl.runtime.launch import check_launch
from pte_trl.runtime.ownership import own
from pte_trl.runtime.resume import is_finished
from pte_trl.runtime.startup import StartupGuard
from pte_trl.runtime.trackers import tolerate_trackers
from pte_trl.runtime.trained import check_enough
from pte_trl.runtime.watch import RankWatch, StopOnTerm
from pte_trl.training.arguments import parse_recipe
from pte_trl.training.calibrate import calibrate_encoders
from pte_trl.training.loading import check_model, load_model
from pte_trl.training.run import find_start, load_data, recipe_settings, train_and_save
from pte_trl.training.trainer import PteGRPOTrainer


@framed
def main(argv: list[str] | None = None) -> PteGRPOTrainer | None:
    """Trains; returns the trainer, None where the run is finished already."""
    with settings_checked():
        script, args = parse_recipe(argv)
        check_needs(script)
        own(args.output_dir)
        settings = recipe_settings(script, args)
        check_launch(args)
        grader = Grader(script.grader_workers, script.grader_time_limit, answer_after=script.answer_after)
        check_model(script, args)
        tokenizer = load_tokenizer(script, args.trust_remote_code)
        with args.main_process_first(desc="data"):
            dataset = load_data(script, args, tokenizer, grader)
        check_enough(args, len(dataset))
        settings |= training_identity(script, tokenizer, dataset)
        if is_finished(args, settings):
            return None
        start = find_start(args, settings)

    rewards = [AccuracyReward(grader)]
    if script.format_reward_weight:
        rewards.append(FormatReward(script.answer_after))
        args.reward_weights = [1.0, script.format_reward_weight]

    stop = StopOnTerm(batch_steps(args))
    with settings_checked():
        trainer = PteGRPOTrainer(
            model=load_model(script, args.trust_remote_code),
            reward_funcs=rewards,
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=None if script.adapter else script.adapter_config(args.method),
            callbacks=[EfficiencyCallback(), stop, RankWatch()],
        )
    trainer.settings, trainer.answer_after = settings, script.answer_after
    tolerate_trackers(trainer)
    trainer.add_callback(StartupGuard(trainer, script.max_prompt_tokens))
    if script.adapter is None:
        calibrate_encoders(trainer)
    return train_and_save(trainer, start, settings, stop)
