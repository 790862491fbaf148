"""Teaches an adapter under a bounded cache to be the base model with the full cache; GRPO then starts from it.

    accelerate launch recipes/distill_pte.py --config recipes/distill_tiny.yaml
    accelerate launch recipes/distill_pte.py --config recipes/distill_smollm2.yaml --method lora_c --output_dir OUT
    accelerate launch recipes/grpo_pte.py --config recipes/tiny.yaml --adapter outputs/tiny-pte-distilled

The data are those of GRPO, of which only the problems are used. With `--sample_to FILE` nothing is trained: the
teacher's completions are written; `--completions FILE` then distils on them, so that several runs share one rollout.
"""

from pte_trl.runtime.entry import run
from pte_trl.training.distill.script import main

if __name__ == "__main__":
    run(main)
