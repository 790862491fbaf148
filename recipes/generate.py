"""Asks a model questions under a fixed budget of cached tokens, and shows the answer as it is written.

    python recipes/generate.py --recipe recipes/smollm2.yaml --question "What is 7 + 5?" --budget 512
    python recipes/generate.py --recipe recipes/qwen3b.yaml --adapter outputs/qwen3b-pte --file questions.txt \
        --budget 1024 --max_new_tokens 65536

The text goes to the standard output; every `status_every` tokens a line about the cache goes to the standard error.
"""

from pte_trl.evaluation.generate import main
from pte_trl.runtime.entry import run

if __name__ == "__main__":
    run(main)
