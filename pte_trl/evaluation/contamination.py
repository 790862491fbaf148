"""Which benchmark problems are in DAPO-Math-17k: makes contaminated.json, which evaluations flag rows by.

python -m pte_trl.evaluation.contamination --data_dir FOLDER_OF_JSONL_FILES
"""

import argparse
import json

from pte_trl.data.decontaminate import load_eval_problems, overlap
from pte_trl.data.problems import load_problems
from pte_trl.evaluation.benchmarks import FACTS, problem_key
from pte_trl.runtime.manifest import write_json


def find(train: list[str], eval_sets: dict[str, list[str]]) -> dict[str, list[str]]:
    """Keys of the evaluation problems of which a training problem has at least 90 % of the shingles."""
    found = {}
    for name, problems in eval_sets.items():
        hit = sorted({match.eval_index for match in overlap(train, problems)})
        found[name] = [problem_key(problems[index]) for index in hit]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", help="folder of data files NAME.jsonl, .csv, ... instead of the hub")
    args = parser.parse_args()
    sets = load_eval_problems(args.data_dir)
    sets["gsm8k_test"] = list(load_problems("gsm8k_test", data_dir=args.data_dir)["problem"])
    found = find(list(load_problems("dapo_math_17k", data_dir=args.data_dir)["problem"]), sets)
    path = write_json(FACTS / "contaminated.json", found)
    print(json.dumps({name: len(keys) for name, keys in found.items()}), path)


if __name__ == "__main__":
    main()
