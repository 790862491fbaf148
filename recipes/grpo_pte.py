"""GRPO under a bounded cache, with Progressive Thought Encoding, LoRA-c or LoRA.

    python recipes/grpo_pte.py --config recipes/tiny.yaml
    accelerate launch recipes/grpo_pte.py --config recipes/qwen3b.yaml
    accelerate launch recipes/grpo_pte.py --config recipes/qwen3b.yaml --method lora_c --output_dir outputs/lora_c

Every key of a recipe is a flag as well; the flag beats the recipe. `--help` lists them.
"""

import signal
import sys

from accelerate.utils import broadcast_object_list

from pte_trl.checkpoints import batch_steps, is_finished, starting_point
from pte_trl.data import build_prompts, load_problems
from pte_trl.decontaminate import load_eval_problems, remove_overlap
from pte_trl.efficiency import EfficiencyCallback
from pte_trl.entry import framed, run, settings_checked
from pte_trl.faults import RankWatch, StopOnTerm, tolerate_trackers
from pte_trl.identity import training_identity
from pte_trl.launch import check_launch
from pte_trl.loading import calibrate_encoders, check_model, load_model, load_tokenizer
from pte_trl.manifest import recipe_settings, save_run
from pte_trl.needs import check_needs
from pte_trl.ownership import own
from pte_trl.parsing import parse_recipe
from pte_trl.rewards import AccuracyReward, FormatReward, Grader, check_golds
from pte_trl.startup import StartupGuard
from pte_trl.trained import check_enough
from pte_trl.trainer import PteGRPOTrainer


def load_data(script, args, tokenizer, grader=None):
    """Training prompts: loaded, cleaned of benchmark problems, golds read by the grader, long prompts dropped.

    Without a grader, as in a distillation, the golds are not used.
    """
    problems = load_problems(
        script.dataset_name,
        data_dir=script.data_dir,
        config=script.dataset_config,
        split=script.dataset_split,
        problem_column=script.problem_column,
        answer_column=script.answer_column,
        limit=script.dataset_limit,
    )
    if script.decontaminate:
        problems = remove_overlap(problems, load_eval_problems(script.data_dir))
    if grader is not None:
        check_golds(problems, grader=grader)
    return build_prompts(
        problems,
        tokenizer,
        system_prompt=script.system_prompt,
        max_prompt_tokens=script.max_prompt_tokens,
        chat_template_kwargs=args.chat_template_kwargs,
    )


def find_start(args, settings: dict) -> str | None:
    """The checkpoint to go on from, chosen by the main process for all."""
    found = [None, None]
    if args.process_index == 0:
        try:
            found[0] = starting_point(args, settings)
        except ValueError as error:
            found[1] = str(error)
    broadcast_object_list(found)
    if found[1] is not None:
        raise ValueError(found[1])
    return None if found[0] is None else str(found[0])


def train_and_save(trainer, start: str | None, settings: dict, stop: StopOnTerm):
    """Trains from `start` on and leaves the whole run; `framed` says what ends it too early.

    Raises:
        SystemExit: after SIGTERM or Ctrl-C.
    """
    try:
        trainer.train(resume_from_checkpoint=start)
    finally:
        stop.on_train_end()  # transformers does not say so where an error ends the training
    if stop.stopped:
        name = signal.Signals(stop.stopped).name
        trainer.accelerator.print(f"stopped by {name} at step {trainer.state.global_step}; the same command goes on")
        sys.exit(128 + stop.stopped)
    save_run(trainer, settings)
    return trainer


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


if __name__ == "__main__":
    run(main)
