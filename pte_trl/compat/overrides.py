"""Private methods of other libraries that our classes override, and what we rely on in each.

They cannot be moved to one place, so this table has them all: our class -> method -> why, with the names of the
arguments that are passed on. `tests/test_compat.py` compares it with the classes (no private method may be overridden,
on purpose or by accident, that is not here), with the signatures of the libraries, and looks for the tests that say
what must hold.
"""

from typing import NamedTuple


class Override(NamedTuple):
    """One private method.

    Attributes:
        base: MODULE:CLASS that has it.
        arguments: names of its first arguments, without `self`, that we take or pass on by name or place.
        why: what is done otherwise, and what must be returned.
        tests: FILE::TEST of what must hold, in tests/.
    """

    base: str
    arguments: tuple[str, ...]
    why: str
    tests: tuple[str, ...]


TRAINER = "transformers:Trainer"
GRPO = "trl:GRPOTrainer"
DISTILLATION = "trl:DistillationTrainer"
TUNER = "peft.tuners.tuners_utils:BaseTuner"
LAYER = "peft.tuners.tuners_utils:BaseTunerLayer"
PARSER = "latex2sympy2_extended.latex2sympy2:_Latex2Sympy"

GENERATE = ("prompt_ids", "images", "multimodal_fields", "num_generations")

OVERRIDES: dict[str, dict[str, Override]] = {
    "pte_trl.training.trainer:PteGRPOTrainer": {
        "_generate_single_turn": Override(
            GRPO,
            GENERATE,
            "the rollout under the bounded cache; returns token ids and log-probs of the completions, as lists",
            ("test_trainer.py::test_the_replay_scores_what_was_sampled", "test_compat_trl.py::test_a_rollout_of_trl"),
        ),
        "_generate_and_score_completions": Override(
            GRPO,
            ("inputs",),
            "adds W of every sample to the batch, before TRL shuffles and splits it; returns a dict of tensors",
            ("test_trainer.py::test_every_sample_is_scored_under_its_own_window",),
        ),
        "_prepare_inputs": Override(
            GRPO,
            ("generation_batch",),
            "puts samples of one W into one micro-batch; returns the micro-batch whose turn it is",
            (
                "test_micro_batches.py::test_a_training_scores_samples_of_one_window_together",
                "test_compat_trl.py::test_micro_batches_of_trl",
            ),
        ),
        "_get_per_token_logps_and_entropies": Override(
            GRPO,
            (
                "model",
                "input_ids",
                "attention_mask",
                "logits_to_keep",
                "batch_size",
                "compute_entropy",
                "compute_aux_loss",
            ),
            "the replay instead of one forward with the full cache; returns log-probs, entropies or None, and None",
            ("test_trainer.py::test_the_replay_scores_what_was_sampled", "test_compat_trl.py::test_scores_of_trl"),
        ),
        "_compute_loss": Override(
            GRPO,
            ("model", "inputs"),
            "keeps the batch, whose schedules the replay inside needs; returns the loss",
            ("test_trainer.py::test_both_replays_take_the_same_step",),
        ),
        "_get_grad_norm": Override(
            GRPO,
            ("model", "grad_norm"),
            "stops before a step along a gradient that is not finite; returns the norm",
            ("test_faults.py::test_a_number_that_is_not_finite_stops_the_run",),
        ),
    },
    "pte_trl.training.distill.trainer:PteDistillationTrainer": {
        "_generate_single_turn": Override(
            DISTILLATION,
            GENERATE[:3],
            "completions of the teacher, of the student under its window, or of the data; returns token ids alone",
            ("test_distill.py::test_who_writes",),
        ),
        "_generate_and_score_completions": Override(
            DISTILLATION,
            ("inputs",),
            "adds schedules and distilled places to the batch before it is shuffled and split; returns a dict",
            ("test_distill.py::test_only_tokens_after_an_eviction",),
        ),
        "_prepare_inputs": Override(
            DISTILLATION,
            ("generation_batch",),
            "puts samples of one W into one micro-batch; returns the micro-batch whose turn it is",
            ("test_micro_batches.py::test_a_training_scores_samples_of_one_window_together",),
        ),
        "_compute_loss": Override(
            DISTILLATION,
            ("unwrapped_student", "inputs", "num_items_in_batch"),
            "the divergence from the base with the full cache; returns loss, entropy summed, and how many tokens",
            ("test_distill.py::test_accumulation_takes_the_same_step",),
        ),
    },
    "pte_trl.runtime.checkpoints:AtomicCheckpoints": {
        "_get_output_dir": Override(
            TRAINER,
            ("trial",),
            "a checkpoint is written into partial/; returns the folder",
            ("test_faults.py::test_a_full_disk_is_named_and_costs_no_checkpoint",),
        ),
        "_save_checkpoint": Override(
            TRAINER,
            ("model", "trial"),
            "seals and renames what every rank has written",
            ("test_resume.py::test_a_killed_run_goes_on_as_if_it_had_not_been",),
        ),
        "_prepare_for_training": Override(
            TRAINER,
            ("max_steps", "train_dataloader", "resume_from_checkpoint"),
            "loads the optimizer, and with DeepSpeed the whole checkpoint: tensors only, no code",
            (
                "test_resume.py::test_a_poisoned_checkpoint_of_zero_ends_the_run_and_runs_nothing",
                "test_safety.py::test_transformers_unpickles_nothing_on_its_way",
            ),
        ),
        "_load_best_model": Override(
            TRAINER,
            (),
            "loads with DeepSpeed as well: tensors only, no code",
            ("test_safety.py::test_transformers_unpickles_nothing_on_its_way",),
        ),
        "_run_epoch": Override(
            TRAINER,
            ("model", "epoch", "train_dataloader"),
            "a run resumed after its last step would make one more, and one resumed in a later epoch take the first "
            "one's order",
            (
                "test_resume.py::test_a_killed_run_goes_on_as_if_it_had_not_been",
                "test_checkpoints.py::test_a_run_resumed_in_a_later_epoch_sees_the_same_prompts",
            ),
        ),
        "_get_train_sampler": Override(
            GRPO,
            (),
            "keeps the sampler, whose draws for earlier epochs a resumed run repeats; returns it",
            ("test_checkpoints.py::test_a_run_resumed_in_a_later_epoch_sees_the_same_prompts",),
        ),
        "_determine_best_metric": Override(
            TRAINER,
            ("metrics", "trial"),
            "returns whether to save under `save_strategy: best`, so also what a signal or the clock has asked for",
            ("test_checkpoints.py::test_a_signal_saves_although_the_step_is_not_the_best",),
        ),
        "_push_from_checkpoint": Override(
            TRAINER,
            ("checkpoint_folder",),
            "uploads a checkpoint from its final place, not from partial/",
            ("test_checkpoints.py::test_what_is_pushed_is_there_when_it_is_read",),
        ),
    },
    "pte_trl.adapter.model:PteModel": {
        "_prepare_adapter_config": Override(
            TUNER,
            ("peft_config", "model_config"),
            "copies the config, into which the model's shape goes; returns the one that is used from there on",
            ("test_peft.py::test_one_config_serves_two_shapes",),
        ),
        "_prepare_model": Override(
            TUNER,
            ("peft_config", "model"),
            "refuses what cannot work while the model is untouched",
            ("test_peft.py::test_models_that_would_be_silently_wrong_are_refused",),
        ),
        "_check_target_module_exists": Override(
            TUNER,
            ("peft_config", "key"),
            "an attention module is a target where one of its layer's linears is",
            ("test_peft_generic.py::test_layers_without_pte_neither_encode_nor_are_calibrated",),
        ),
        "_create_and_replace": Override(
            TUNER,
            ("peft_config", "adapter_name", "target", "target_name", "parent", "current_key"),
            "puts PTE into the attention module and its layer's linears",
            ("test_peft.py::test_several_named_adapters",),
        ),
        "_replace_module": Override(
            TUNER,
            ("parent", "child_name", "new_module", "child"),
            "unloading: PEFT's own copies `weight`, which an attention module does not have",
            ("test_peft.py::test_unload_gives_the_base_model_back",),
        ),
        "_remove_adapter_name_from_key": Override(
            TUNER,
            ("key", "adapter_name"),
            "names of an encoder's tensors in the file; returns the key without the adapter's name",
            ("test_peft_names.py::test_an_adapter_of_any_name_is_the_same_under_another",),
        ),
        "_remap_adapter_state_dict_for_load": Override(
            TUNER,
            ("model", "config", "adapter_name", "state_dict"),
            "refuses a file in which tensors are missing; returns the tensors by their names in the model",
            ("test_peft_apis.py::test_a_half_loaded_adapter_is_an_error_and_not_a_warning",),
        ),
        "_check_merge_allowed": Override(
            TUNER,
            (),
            "refuses merging, which has no meaning here",
            ("test_peft.py::test_merging_is_refused_and_breaks_nothing",),
        ),
        "_enable_peft_forward_hooks": Override(
            "peft:PeftModel",  # which calls it on the tuner, if it has one
            (),
            "refuses `adapter_names`, which PEFT would drop without a word; a context around every forward",
            ("test_peft_apis.py::test_what_cannot_work_is_refused",),
        ),
    },
    "pte_trl.rewards.equality:_Parser": {  # the whole base class is private
        "parse": Override(
            PARSER,
            ("latex_str",),
            "reads to the end of the text or refuses it; returns an expression of sympy",
            ("test_answers.py::test_the_parser_reads_to_the_end_or_not_at_all",),
        ),
        "convert_postfix_list": Override(
            PARSER,
            ("arr", "i"),
            "what stands side by side is multiplied, and `2(3)` is no mixed number; returns an expression",
            ("test_answers.py::test_the_parser_multiplies_what_stands_side_by_side",),
        ),
    },
    "pte_trl.adapter.layer:PteLayer": {
        "_get_base_layer_device_and_dtype": Override(
            LAYER,
            ("base_layer",),
            "where an adapter loaded with `low_cpu_mem_usage` goes; returns a device, and no dtype to round to",
            ("test_peft_apis.py::test_every_way_to_load_gives_the_same_model",),
        ),
    },
    "pte_trl.adapter.encoder:Encoder": {
        "_apply": Override(
            "torch.nn:Module",
            ("fn", "recurse"),
            "`.to` and its kind: whiteners follow to a device and are not narrowed; returns the module",
            ("test_peft_state.py::test_whiteners_are_neither_narrowed_nor_rounded",),
        ),
    },
    "experiments.study.grpo:GivenThoughtTrainer": {
        "_generate_single_turn": Override(
            GRPO,
            GENERATE,
            "the thought is given, one token is sampled",
            ("test_study.py::test_only_the_answer_is_rewarded_and_trained",),
        ),
        "_generate_and_score_completions": Override(
            GRPO,
            ("inputs",),
            "marks the tokens that the policy did not write, in TRL's own `tool_mask`",
            ("test_study.py::test_only_the_answer_is_rewarded_and_trained",),
        ),
    },
}

# What we read in the batches and metrics of TRL, and on its trainers; documented nowhere.
BATCH_KEYS = ("prompt_ids", "prompt_mask", "completion_ids", "completion_mask", "sampling_per_token_logps")
METRICS = ("reward", "frac_reward_zero_std", "completions/clipped_ratio")
TRAINER_ATTRIBUTES = ("temperature", "max_completion_length", "eos_token_ids", "reward_funcs")
