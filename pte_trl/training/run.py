"""The course of a training by a recipe: checks, data, where it resumes, training, and what a finished run leaves."""

from collections.abc import Callable
from dataclasses import dataclass

from accelerate import PartialState
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from pte_trl.data.decontaminate import load_eval_problems, remove_overlap
from pte_trl.data.needs import check_needs
from pte_trl.data.problems import load_problems
from pte_trl.data.prompts import build_prompts
from pte_trl.models.tokens import load_tokenizer
from pte_trl.rewards.grader import check_golds
from pte_trl.runtime.entry import settings_checked
from pte_trl.runtime.identity import training_identity
from pte_trl.runtime.launch import check_launch
from pte_trl.runtime.ownership import own
from pte_trl.runtime.resume import is_finished, starting_point
from pte_trl.runtime.startup import longest_prompt_that_fits
from pte_trl.runtime.together import on_main
from pte_trl.runtime.trained import check_enough
from pte_trl.runtime.watch import SIGNALS
from pte_trl.training.described import recipe_settings
from pte_trl.training.loading import check_model, load_model

Read = Callable[[PreTrainedTokenizerBase], Dataset]
Arguments = Callable[[PreTrainedTokenizerBase], dict]


@dataclass
class Start:
    """What is known of a run before the weights load.

    Attributes:
        settings: as the manifest records them.
        checkpoint: the one to resume from, None to begin at step 0.
    """

    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    settings: dict
    checkpoint: str | None = None


def train(script, args, trainer: type, read: Read, arguments: Arguments = lambda _: {}):
    """Trains by a recipe; a setting that is refused ends the process with one line.

    Args:
        script: `RecipeArguments`.
        args: the trainer's config.
        trainer: its class.
        read: gives the training set, once the tokenizer is there.
        arguments: gives the trainer's other arguments: rewards, callbacks.

    Returns:
        The trainer; None where the run is finished already.

    Raises:
        SystemExit: for a setting, and after SIGTERM or Ctrl-C.
    """
    with settings_checked():
        start = prepare(script, args, read)
        check_enough(args, len(start.dataset))
        if is_finished(args, start.settings):
            return None
        found = on_main(lambda: starting_point(args, start.settings))
        start.checkpoint = None if found is None else str(found)
        made = trainer(
            model=load_model(script, args.trust_remote_code),
            args=args,
            train_dataset=start.dataset,
            processing_class=start.tokenizer,
            peft_config=None if script.adapter else script.adapter_config(args.method),
            **arguments(start.tokenizer),
        )
    made.settings, made.max_prompt_tokens = start.settings, script.max_prompt_tokens
    made.stop.signals = list(SIGNALS)
    made.train_from(start.checkpoint)
    made.save_run()
    return made


def prepare(script, args, read: Read, file: str | None = None) -> Start:
    """Checks everything that can be checked before the weights load, and reads tokenizer and data.

    Args:
        file: what is written instead of `output_dir`.

    Raises:
        ValueError, OSError: for the first setting that cannot work.
    """
    check_needs(script)
    own(file or args.output_dir, file=file is not None)
    settings = recipe_settings(script, args)
    check_launch(args)
    check_model(script, args)
    tokenizer = load_tokenizer(script, args.trust_remote_code)
    with args.main_process_first(desc="data"):
        dataset = read(tokenizer)
    return Start(tokenizer, dataset, settings | training_identity(script, tokenizer, dataset))


def load_data(script, args, tokenizer: PreTrainedTokenizerBase, grader=None) -> Dataset:
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
        system_prompt_role=script.system_prompt_role,
        max_prompt_tokens=longest_prompt_kept(script, args),
        chat_template_kwargs=args.chat_template_kwargs,
    )


def longest_prompt_kept(script, args) -> int:
    """Tokens of a prompt at most: `max_prompt_tokens`, or what a budget leaves a thought behind; printed then."""
    limit = longest_prompt_that_fits(args.cache_policy, script.max_prompt_tokens)
    if limit < script.max_prompt_tokens:
        PartialState().print(f"budget={args.budget}: prompts of more than {limit} tokens leave no room for a thought")
    return limit
