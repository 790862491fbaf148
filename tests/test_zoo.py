"""Every decoder of transformers as a tiny random model: its views agree, or it is refused in one sentence.

The table is `tests/zoo.py`. `make test-all` runs every cell, and `python -m tests.zoo_report` writes docs/zoo.md from
them. By default a diagonal runs, in some 20 seconds:

- one architecture of each main kind, under the views and arms of `DIAGONAL`, which has every view and every arm;
- every other one that is refused, or that needs a configuration of its own, once: under the cheapest view.

Left to `make test-all` are those whose line in the table names no more than a kind of the diagonal (`COMMON`).
"""

import itertools

import pytest

from pte_trl.adapter.fit import check_supported
from tests.zoo import ALL_FULL, HYBRID, LATENT, MIXED, NOT_TRIED, ROWS, ZOO, Row, config_of_row, registered
from tests.zoo_views import ARMS, SHARE, VIEWS, allowed, measure

DIAGONAL = {
    "llama": ("gradient", "pte"),
    "qwen3": ("engine", "pte-all"),  # norms of a head's queries and keys
    "phi3": ("replay", "pte-all"),  # one matrix for queries, keys and values
    "olmoe": ("segments", "pte"),  # experts
    "qwen3_moe": ("replay", "pte"),
    "deepseek_v3": ("chunks", "pte"),  # latent attention
    "gemma2": ("gradient", "pte"),  # sliding layers, capped scores
    "gemma3_text": ("segments", "pte-all"),  # a rotary for each type of layer
    "gpt_oss": ("engine", "pte"),  # attention sinks
    "mimo_v2_flash": ("replay", "pte-all"),  # values of another width than keys
    "llama4_text": ("replay", "pte"),  # complex rotary, layers without one
    "qwen3_next": ("segments", "pte"),  # gated delta rule, gated attention
    "granitemoehybrid": ("gradient", "pte"),  # Mamba-2: its step writes in place
    "falcon_h1": ("engine", "bare"),  # attention and Mamba-2 in one layer
    "lfm2": ("chunks", "pte-all"),  # short convolutions
    "nemotron_h": ("replay", "pte"),  # layers without any state
    "jamba": ("gradient", "bare"),  # refused: nothing to compare with
}


COMMON = ({}, ALL_FULL, MIXED, HYBRID, LATENT)


def diagonal(row: Row) -> tuple[str, str] | None:
    """The view and arm that run by default."""
    if row.name in DIAGONAL:
        return DIAGONAL[row.name]
    if row.refused:
        return "replay", "pte"
    return None if row.config in COMMON else ("chunks", "bare")


def cells():
    """Every architecture with every view and arm."""
    for row, *kind in itertools.product(ROWS, VIEWS, ARMS):
        marks = () if diagonal(row) == tuple(kind) else pytest.mark.thorough
        yield pytest.param(row.name, *kind, marks=marks, id="-".join((row.name, *kind)))


@pytest.mark.parametrize(("name", "view", "arm"), cells())
def test_views_agree_or_the_model_is_refused(name, view, arm):
    row = ZOO[name]
    words = row.words_of_refusal(view, arm)
    if words is not None:
        with pytest.raises(ValueError, match=words):
            measure(row, view, arm)
        return
    cell = measure(row, view, arm, trusted=True)
    assert cell.gap <= allowed(row, view), cell
    assert cell.gap <= SHARE * cell.contrast, cell


def test_every_decoder_of_transformers_is_known():
    """After an upgrade: try the new ones, by a line in the table each."""
    known = {row.model_type for row in ROWS}.union(*(names.split() for names in NOT_TRIED.values()))
    new = sorted(set(registered()) - known)
    assert not new, "in ROWS of tests/zoo.py, or in NOT_TRIED: " + ", ".join(f'row("{name}")' for name in new)
    gone = sorted(known - set(registered()))
    assert not gone, f"transformers no longer has {gone}"


def test_the_diagonal_has_every_view_and_arm():
    assert DIAGONAL.keys() <= ZOO.keys()
    assert [set(each) for each in zip(*DIAGONAL.values(), strict=True)] == [set(VIEWS), set(ARMS)]


def test_each_is_in_one_place():
    assert len(ZOO) == len(ROWS)
    assert not {row.model_type for row in ROWS}.intersection(" ".join(NOT_TRIED.values()).split())


def accepted():
    """Every architecture and method; by default one whose layers give several streams."""
    for name, method in itertools.product(ZOO, ["lora_c", "pte"]):
        fast = (name, method) == ("gemma3n_text", "pte")
        yield pytest.param(name, method, marks=() if fast else pytest.mark.thorough, id=f"{name}-{method}")


@pytest.mark.parametrize(("name", "method"), accepted())
def test_the_self_test_takes_what_is_right(name, method):
    row = ZOO[name]
    if row.words_of_refusal("replay", "bare" if method == "lora_c" else "pte") is None:
        check_supported(config_of_row(row), method, attention=row.attention)
