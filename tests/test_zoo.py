"""Every decoder of transformers as a tiny random model: its views agree, or it is refused in one sentence.

The table is `tests/zoo.py`. By default every architecture is built once, under one view; `make test-all` runs every
cell, and `python -m tests.zoo_report` writes docs/zoo.md from them.
"""

import itertools

import pytest

from pte_trl.adapter.fit import check_supported
from tests.zoo import NOT_TRIED, ROWS, ZOO, config_of_row, registered
from tests.zoo_views import ARMS, SHARE, VIEWS, allowed, measure


def cells():
    """Every architecture with every arm and view; by default one of them each, taken in turn."""
    kinds = list(itertools.product(VIEWS, ARMS))
    for number, (name, kind) in enumerate(itertools.product(ZOO, kinds)):
        row, column = divmod(number, len(kinds))
        # Neighbours in the table are of one sort, so they take views far apart.
        fast = column == 4 * row % len(kinds)
        yield pytest.param(name, *kind, marks=() if fast else pytest.mark.thorough, id="-".join((name, *kind)))


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


def test_each_is_in_one_place():
    assert len(ZOO) == len(ROWS)
    assert not {row.model_type for row in ROWS}.intersection(" ".join(NOT_TRIED.values()).split())


@pytest.mark.thorough
@pytest.mark.parametrize("method", ["lora_c", "pte"])
@pytest.mark.parametrize("name", ZOO)
def test_the_self_test_takes_what_is_right(name, method):
    row = ZOO[name]
    if row.words_of_refusal("replay", "bare" if method == "lora_c" else "pte") is None:
        check_supported(config_of_row(row), method, attention=row.attention)
