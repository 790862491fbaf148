"""Teaches an adapter under a bounded cache to be the base model with the full cache; GRPO then starts from it.

    accelerate launch recipes/distill_pte.py --config recipes/distill_tiny.yaml
    accelerate launch recipes/distill_pte.py --config recipes/distill_smollm2.yaml --method lora_c --output_dir OUT
    accelerate launch recipes/grpo_pte.py --config recipes/tiny.yaml --adapter outputs/tiny-pte-distilled

The data are those of GRPO, of which only the problems are used. With `--sample_to FILE` nothing is trained: the
teacher's completions are written; `--completions FILE` then distils on them, so that several runs share one rollout.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

from transformers.trainer_utils import get_last_checkpoint

from grpo_pte import load_data
from pte_trl.config import RecipeArguments
from pte_trl.distill import PteDistillationTrainer, PteDistillConfig
from pte_trl.distill.completions import read_completions, write_completions
from pte_trl.loading import calibrate_encoders, check_model, load_model, load_tokenizer
from pte_trl.manifest import recipe_settings, save_run
from pte_trl.parsing import parse


@dataclass
class DistillArguments(RecipeArguments):
    """`RecipeArguments`, and where the teacher's completions are kept."""

    completions: str | None = field(default=None, metadata={"help": "File of completions to distil on."})
    sample_to: str | None = field(default=None, metadata={"help": "File to write the teacher's completions to."})


def main(argv: list[str] | None = None) -> PteDistillationTrainer | None:
    try:
        script, args = parse((DistillArguments, PteDistillConfig), argv)
        if script.completions and (args.on_policy or script.sample_to):
            raise ValueError(f"completions={script.completions!r}: nothing is sampled then; leave it out")
        check_model(script, args)
        tokenizer = load_tokenizer(script, args.trust_remote_code)
        with args.main_process_first(desc="data"):
            read = read_completions(script.completions, tokenizer) if script.completions else None
            dataset = load_data(script, args, tokenizer) if read is None else read
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    if script.sample_to:
        write_completions(Path(script.sample_to), load_model(script, args.trust_remote_code), tokenizer, dataset, args)
        return None

    trainer = PteDistillationTrainer(
        model=load_model(script, args.trust_remote_code),
        args=args,
        train_dataset=dataset,
        processing_class=tokenizer,
        peft_config=None if script.adapter else script.adapter_config(args.method),
    )
    if script.adapter is None:
        calibrate_encoders(trainer)
    resume = args.resume_from_checkpoint
    if resume == "auto":  # the newest checkpoint, or from the start where there is none
        resume = get_last_checkpoint(args.output_dir) if Path(args.output_dir).is_dir() else None
    trainer.train(resume_from_checkpoint=resume)
    save_run(trainer, recipe_settings(script, args))
    return trainer


if __name__ == "__main__":
    main()
