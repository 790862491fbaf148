"""Teaches an adapter under a bounded cache to be the base model with the full cache; GRPO then starts from it.

The command is `recipes/distill_pte.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from pte_trl.runtime.entry import framed, settings_checked
from pte_trl.settings.parsing import parse
from pte_trl.training.arguments import RecipeArguments
from pte_trl.training.distill import PteDistillationTrainer, PteDistillConfig
from pte_trl.training.distill.completions import check_new_file, read_completions, write_completions
from pte_trl.training.loading import load_model
from pte_trl.training.run import load_data, longest_prompt_kept, prepare, train


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

    def read(tokenizer):
        if script.completions:
            return read_completions(
                script.completions, tokenizer, longest_prompt_kept(script, args), args.chat_template_kwargs
            )
        return load_data(script, args, tokenizer)

    if not script.sample_to:
        return train(script, args, PteDistillationTrainer, read)
    with settings_checked():
        check_new_file(script.sample_to)
        start = prepare(script, args, read, file=script.sample_to)
    model = load_model(script, args.trust_remote_code)
    write_completions(Path(script.sample_to), model, start.tokenizer, start.dataset, args)
    return None
