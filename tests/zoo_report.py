"""Writes docs/zoo.md: every architecture of the zoo under every view.

    python -m tests.zoo_report [--out docs/zoo.md] [--workers 2] [--minutes 60] [architecture ...]

What there was no time for is marked so in the page.
"""

import argparse
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import chain
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers.utils import logging

from pte_trl.compat.transformers import layer_types
from pte_trl.markdown import table
from tests.zoo import NOT_TRIED, ZOO, Row, config_of_row
from tests.zoo_views import ARMS, SHARE, VIEWS, NotMeasured, allowed, measure

HEAD = """# Which architectures work

Every decoder of transformers as a tiny random model in float64, also where its code asks for float32: what two views
of the same tokens differ by at most, in a log-prob or relative in a gradient. Prompts are padded left, W = 6, and
seven evictions follow. `tests/test_zoo.py` fails where a cell changes. Written by `python -m tests.zoo_report` on
{day}, with torch {torch} and transformers {transformers}.

A cell is bare / PTE on q_proj and o_proj, for a replay also / PTE on every linear that it can adapt. In bold is what
does not agree. "refused" is by the sentence below; "-" is what transformers' own code does not allow to measure; "not
run" was left out of this run for time.

- replay: one pass against the decode token by token.
- chunks: the decode in pieces that no eviction interrupts, against one pass.
- engine: the rollout engine against its reference implementation and one pass. Its log-probs are float32.
- segments: `replay: segments` against one pass, with gradients.
- gradient: of one pass against autograd through the decode; in pieces where the step of one token writes a recurrent
  state in place.

"""
SHORT = {
    "full_attention": "full",
    "sliding_attention": "sliding",
    "chunked_attention": "chunked",
    "linear_attention": "recurrent",
}


def layers_in(row: Row) -> str:
    """The types of layers in the row's model."""
    return ", ".join(dict.fromkeys(SHORT.get(kind, kind) for kind in layer_types(config_of_row(row))))


def row_of(name: str, until: float) -> tuple[list[str], list[str]]:
    """The line of an architecture, and the sentences in which something is refused.

    Args:
        until: `time.time()` after which no other view is begun.
    """
    torch.set_num_threads(1)
    logging.set_verbosity_error()
    row, sentences = ZOO[name], {}
    line = [f"`{name}`", layers_in(row)]
    for view in VIEWS:
        found = []
        if time.time() > until:
            line.append("not run")
            continue
        for arm in ARMS if view == "replay" else ARMS[:2]:
            try:
                cell = measure(row, view, arm)
            except Exception as error:
                found.append(word_of(error))
                where = sentences.setdefault(str(error).strip().splitlines()[0], [])
                # Refused in the first view is an arm as a whole.
                if not set(where) & {*ARMS, view}:
                    where.append(arm if view == "replay" else view)
            else:
                passed = cell.gap <= min(allowed(row, view), SHARE * cell.contrast)
                found.append(f"{cell.gap:.0e}" if passed else f"**{cell.gap:.0e}**")
        line.append(found[0] if set(found) in ({"refused"}, {"-"}) else " / ".join(found))
    print(*line, sep=" | ", file=sys.stderr, flush=True)
    return line, [f"- `{name}`, {', '.join(where)}: {sentence}" for sentence, where in sentences.items()]


def word_of(error: Exception) -> str:
    if isinstance(error, NotMeasured):
        return "-"
    return "refused" if isinstance(error, ValueError) else "**fails**"


def report(names: list[str], workers: int, minutes: float) -> str:
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        found = pool.map(partial(row_of, until=time.time() + 60 * minutes), names)
        lines, refused = zip(*found, strict=True)
    head = HEAD.format(day=date.today().isoformat(), **{name: version(name) for name in ("torch", "transformers")})
    parts = [table(["model type", "layers", *VIEWS], lines), "", "## What is refused, in which words", ""]
    parts += ["What is refused bare is refused with PTE as well; what is refused in the replay, in every view.", ""]
    parts += [*chain(*refused), "", "## Not tried", ""]
    parts += [f"- {reason}: {', '.join(names.split())}" for reason, names in NOT_TRIED.items()]
    return head + "\n".join([*parts, ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", metavar="architecture", help="default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/zoo.md"))
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=60.0, help="default: %(default)s")
    args = parser.parse_args()
    args.out.write_text(report(args.names or list(ZOO), args.workers, args.minutes))


if __name__ == "__main__":
    main()
