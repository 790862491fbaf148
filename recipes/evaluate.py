"""Evaluates a model, with or without an adapter, on benchmarks, under a bounded or the full cache.

    accelerate launch recipes/evaluate.py --recipe recipes/qwen3b.yaml --adapter outputs/qwen3b-pte \
        --benchmarks math500 aime24 --budget 1024 --samples 5 --output_dir outputs/eval/qwen3b-pte-1024

Every sample is a line of OUTPUT_DIR/BENCHMARK/records.jsonl; a killed evaluation resumes. Metrics:
`python -m pte_trl.evaluation.metrics OUTPUT_DIR`.
"""

from pte_trl.evaluation.script import main
from pte_trl.runtime.entry import run

if __name__ == "__main__":
    run(main)
