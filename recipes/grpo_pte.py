"""GRPO under a bounded cache, with Progressive Thought Encoding, LoRA-c or LoRA.

    python recipes/grpo_pte.py --config recipes/tiny.yaml
    accelerate launch recipes/grpo_pte.py --config recipes/qwen3b.yaml
    accelerate launch recipes/grpo_pte.py --config recipes/qwen3b.yaml --method lora_c --output_dir outputs/lora_c

Every key of a recipe is a flag as well; the flag beats the recipe. `--help` lists them.
"""

import sys
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from pte_trl.data import build_prompts, load_problems
from pte_trl.decontaminate import load_eval_problems, remove_overlap
from pte_trl.efficiency import EfficiencyCallback
from pte_trl.launch import check_launch
from pte_trl.loading import calibrate_encoders, check_model, load_model, load_tokenizer
from pte_trl.manifest import write_manifest
from pte_trl.parsing import parse_recipe
from pte_trl.rewards import AccuracyReward, Grader, check_golds, format_reward
from pte_trl.startup import StartupGuard
from pte_trl.trainer import PteGRPOTrainer


def load_data(script, args, tokenizer):
    """Training prompts: loaded, cleaned of benchmark problems, golds parsed, long prompts dropped."""
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
    check_golds(problems)
    return build_prompts(
        problems,
        tokenizer,
        system_prompt=script.system_prompt,
        max_prompt_tokens=script.max_prompt_tokens,
        chat_template_kwargs=args.chat_template_kwargs,
    )


def main(argv: list[str] | None = None) -> PteGRPOTrainer:
    try:
        script, args = parse_recipe(argv)
        check_launch(args)
        check_model(script, args)
        tokenizer = load_tokenizer(script)
        with args.main_process_first(desc="data"):
            dataset = load_data(script, args, tokenizer)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")

    grader = Grader(workers=script.grader_workers, time_limit=script.grader_time_limit)
    rewards = [AccuracyReward(grader)]
    if script.format_reward_weight:
        rewards.append(format_reward)
        args.reward_weights = [1.0, script.format_reward_weight]

    trainer = PteGRPOTrainer(
        model=load_model(script),
        reward_funcs=rewards,
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=None if script.adapter else script.adapter_config(args.method),
        callbacks=[EfficiencyCallback()],
    )
    trainer.add_callback(StartupGuard(trainer, script.max_prompt_tokens))
    if script.adapter is None:
        calibrate_encoders(trainer)
    resume = args.resume_from_checkpoint
    if resume == "auto":  # the newest checkpoint, or from the start where there is none
        resume = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model(args.output_dir)
    if trainer.accelerator.is_main_process:
        trainer.state.save_to_json(f"{args.output_dir}/trainer_state.json")
        settings = vars(script) | {key: value for key, value in args.to_dict().items() if value is not None}
        write_manifest(args.output_dir, trainer.accelerator.device, trainer.accelerator.num_processes, settings)
    return trainer


if __name__ == "__main__":
    main()
