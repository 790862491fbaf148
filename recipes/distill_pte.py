"""Teaches an adapter under a bounded cache to be the base model with the full cache; GRPO then starts from it.

    accelerate launch recipes/distill_pte.py --config recipes/distill_tiny.yaml
    accelerate launch recipes/distill_pte.py --config recipes/distill_smollm2.yaml --method lora_c --output_dir OUT
    accelerate launch recipes/grpo_pte.py --config recipes/tiny.yaml --adapter outputs/tiny-pte-distilled

The data are those of GRPO, of which only the problems are used. With `--sample_to FILE` nothing is trained: the
teacher's completions are written; `--completions FILE` then distils on them, so that several runs share one rollout.
"""

from dataclasses import dataclass, field
from pathlib import Path

from grpo_pte import find_start, load_data, train_and_save
from pte_trl.checkpoints import batch_steps, is_finished
from pte_trl.config import RecipeArguments
from pte_trl.distill import PteDistillationTrainer, PteDistillConfig
from pte_trl.distill.completions import check_new_file, read_completions, write_completions
from pte_trl.entry import framed, run, settings_checked
from pte_trl.faults import RankWatch, StopOnTerm, tolerate_trackers
from pte_trl.identity import training_identity
from pte_trl.loading import calibrate_encoders, check_model, load_model, load_tokenizer
from pte_trl.manifest import recipe_settings
from pte_trl.needs import check_needs
from pte_trl.ownership import own
from pte_trl.parsing import parse
from pte_trl.trained import check_enough


@dataclass
class DistillArguments(RecipeArguments):
    """`RecipeArguments`, and where the teacher's completions are kept."""

    completions: str | None = field(default=None, metadata={"help": "File of completions to distil on."})
    sample_to: str | None = field(default=None, metadata={"help": "File to write the teacher's completions to."})


@framed
def main(argv: list[str] | None = None) -> PteDistillationTrainer | None:
    """Distils; returns the trainer, None where nothing is trained or the run is finished already."""
    with settings_checked():
        script, args = parse((DistillArguments, PteDistillConfig), argv)
        if script.completions and (args.on_policy or script.sample_to):
            raise ValueError(f"completions={script.completions!r}: nothing is sampled then; leave it out")
        check_needs(script)
        if script.sample_to:
            check_new_file(script.sample_to)
            own(script.sample_to, file=True)
        else:
            own(args.output_dir)
        settings = recipe_settings(script, args)
        check_model(script, args)
        tokenizer = load_tokenizer(script, args.trust_remote_code)
        with args.main_process_first(desc="data"):
            read = read_completions(script.completions, tokenizer) if script.completions else None
            dataset = load_data(script, args, tokenizer) if read is None else read
        settings |= training_identity(script, tokenizer, dataset)
        if not script.sample_to:
            check_enough(args, len(dataset))
            if is_finished(args, settings):
                return None
        start = None if script.sample_to else find_start(args, settings)
    if script.sample_to:
        write_completions(Path(script.sample_to), load_model(script, args.trust_remote_code), tokenizer, dataset, args)
        return None

    stop = StopOnTerm(batch_steps(args))
    with settings_checked():
        trainer = PteDistillationTrainer(
            model=load_model(script, args.trust_remote_code),
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
            peft_config=None if script.adapter else script.adapter_config(args.method),
            callbacks=[stop, RankWatch()],
        )
    trainer.settings = settings
    tolerate_trackers(trainer)
    if script.adapter is None:
        calibrate_encoders(trainer)
    return train_and_save(trainer, start, settings, stop)


if __name__ == "__main__":
    run(main)
