"""What training with PTE does, on one machine without a GPU.

python -m experiments.demo                  digits to remember under a window of eight tokens; some five minutes
python -m experiments.demo --tier sums      GRPO on running sums, a tiny model, before and after
python -m experiments.demo --tier smollm2   the same on SmolLM2-135M and GSM8K
"""

import argparse


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("--tier", choices=("tiny", "sums", "smollm2"), default="tiny")
    options, rest = parser.parse_known_args(argv)
    # Each tier imports only what it needs: the tiny one shows its first line before anything imports torch.
    if options.tier == "tiny":
        from experiments.demo.recall import main as recall

        recall(rest)
    else:
        from experiments.demo.before_after import main as before_after
        from pte_trl.runtime.entry import run

        run(lambda: before_after(["--tier", options.tier, *rest]))


if __name__ == "__main__":
    main()
