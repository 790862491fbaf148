"""Teaches an adapter under a bounded cache to be the base model with the full cache; GRPO then starts from it.

The command is `recipes/distill_pte.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from pte_trl.data.needs import check_needs
from pte_trl.models.tokens import load_tokenizer
from pte_trl.runtime.checkpoints import batch_steps
from pte_trl.runtime.entry import framed, settings_checked
from pte_trl.runtime.identity import training_identity
from pte_trl.runtime.ownership import own
from pte_trl.runtime.resume import is_finished
from pte_trl.runtime.trackers import tolerate_trackers
from pte_trl.runtime.trained import check_enough
from pte_trl.runtime.watch import RankWatch, StopOnTerm
from pte_trl.settings.parsing import parse
from pte_trl.training.arguments import RecipeArguments
from pte_trl.training.calibrate import calibrate_encoders
from pte_trl.training.distill import PteDistillationTrainer, PteDistillConfig
from pte_trl.training.distill.completions import check_new_file, read_completions, write_completions
from pte_trl.training.loading import check_model, load_model
from pte_trl.training.run import find_start, load_data, recipe_settings, train_and_save


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
