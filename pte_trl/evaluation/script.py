"""Evaluates a model, with or without an adapter, on benchmarks, under a bounded or the full cache.

The command is `recipes/evaluate.py`.
"""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from pte_trl.data.needs import check_needs
from pte_trl.evaluation.benchmarks import load_benchmark
from pte_trl.evaluation.config import EvaluationArguments, short_name
from pte_trl.evaluation.loading import check_evaluation_model, load_for_evaluation
from pte_trl.evaluation.metrics import summarise, table
from pte_trl.evaluation.runner import Evaluation, check_problems, check_room
from pte_trl.models.attention import allow_cudnn
from pte_trl.models.tokens import load_tokenizer
from pte_trl.rewards.grader import Grader
from pte_trl.rollouts.vllm import VllmSampler, check_vllm
from pte_trl.runtime.entry import framed, settings_checked
from pte_trl.runtime.launch import check_world
from pte_trl.runtime.manifest import write_manifest
from pte_trl.runtime.ownership import own
from pte_trl.settings.parsing import parse


@framed
def main(argv: list[str] | None = None) -> dict[str, dict]:
    with settings_checked():
        (args,) = parse((EvaluationArguments,), argv)
        check_needs(args)
        # Processes meet only at the end of a benchmark, and one may have the longest completions.
        patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
        accelerator = Accelerator(cpu=args.use_cpu, kwargs_handlers=[patience])
        check_world(accelerator.num_processes)
        for name in args.benchmarks:
            own(Path(args.output_dir) / short_name(name))
        check_evaluation_model(args)
        if args.backend == "vllm":
            check_vllm(args)
        tokenizer = load_tokenizer(args, args.trust_remote_code)
        grader = Grader(args.grader_workers, args.grader_time_limit, answer_after=args.answer_after)
        problems = {name: load_benchmark(name, args.data_dir, args.limit) for name in args.benchmarks}
        for name, rows in problems.items():
            check_room(name, rows, tokenizer, args)
        if accelerator.is_main_process:
            for name, rows in problems.items():
                check_problems(name, rows, grader)

        evaluations = [Evaluation(name, rows, tokenizer, args, accelerator, grader) for name, rows in problems.items()]
        missing = [evaluation for evaluation in evaluations if not evaluation.look()]

    model = None
    allow_cudnn(args.cudnn_attention)
    if missing:
        with settings_checked():
            vllm = args.backend == "vllm"
            model = VllmSampler(args, accelerator) if vllm else load_for_evaluation(args, accelerator.device)
    summaries = {}
    for name, evaluation in zip(problems, evaluations, strict=True):
        with settings_checked():
            summaries[name] = summarise(evaluation.run(model))
        if accelerator.is_main_process and not (evaluation.folder / "manifest.json").is_file():
            settings = asdict(args) | {"benchmark": name}
            write_manifest(evaluation.folder, accelerator.device, accelerator.num_processes, settings)
    accelerator.print(table({f"{Path(args.output_dir).name}/{short_name(name)}": s for name, s in summaries.items()}))
    accelerator.end_training()
    return summaries
