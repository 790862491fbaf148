"""Evaluates a model, with or without an adapter, on benchmarks, under a bounded or the full cache.

    accelerate launch recipes/evaluate.py --recipe recipes/qwen3b.yaml --adapter outputs/qwen3b-pte \
        --benchmarks math500 aime24 --budget 1024 --samples 5 --output_dir outputs/eval/qwen3b-pte-1024

Every sample is a line of OUTPUT_DIR/BENCHMARK/records.jsonl; a killed evaluation goes on where it stood. Metrics:
`python -m pte_trl.evaluation.metrics OUTPUT_DIR`.
"""

from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs

from pte_trl.entry import framed, run, settings_checked
from pte_trl.evaluation.benchmarks import load_benchmark
from pte_trl.evaluation.config import EvaluationArguments, short_name
from pte_trl.evaluation.metrics import summarise, table
from pte_trl.evaluation.runner import Evaluation, check_problems, check_room
from pte_trl.evaluation.vllm import VllmSampler, check_vllm
from pte_trl.launch import check_world
from pte_trl.loading import check_evaluation_model, load_for_evaluation, load_tokenizer
from pte_trl.manifest import write_manifest
from pte_trl.needs import check_needs
from pte_trl.ownership import own
from pte_trl.parsing import parse
from pte_trl.rewards import Grader


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


if __name__ == "__main__":
    run(main)
