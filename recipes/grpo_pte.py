"""GRPO under a bounded cache, with Progressive Thought Encoding, LoRA-c or LoRA.

    python recipes/grpo_pte.py --config recipes/tiny.yaml
    accelerate launch recipes/grpo_pte.py --config recipes/qwen3b.yaml
    accelerate launch recipes/grpo_pte.py --config recipes/qwen3b.yaml --method lora_c --output_dir outputs/lora_c

Every key of a recipe is a flag as well; the flag beats the recipe. `--help` lists them.
"""

from pte_trl.runtime.entry import run
from pte_trl.training.grpo import main

if __name__ == "__main__":
    run(main)
