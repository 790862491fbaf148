"""Grids of which the tests walk the diagonal by default, and every cell with `make test-all`."""

import itertools
from collections.abc import Iterable

import pytest


def grid(**axes: Iterable) -> pytest.MarkDecorator:
    """`parametrize` over every combination; by default those run in which each value of each axis comes once.

        @grid(family=["qwen2", "llama"], targets={"qo": [...], "seven": [...]})
        def test(family, targets): ...

    Args:
        axes: values by argument. Of a dictionary the keys are passed, as `parametrize` does; values that are
            dictionaries are named by what they hold.
    """
    values = [list(axis) for axis in axes.values()]
    diagonal = {tuple(k % len(axis) for axis in values) for k in range(max(map(len, values)))}
    cells = []
    for places in itertools.product(*(range(len(axis)) for axis in values)):
        cell = [axis[place] for axis, place in zip(values, places, strict=True)]
        marks = () if places in diagonal else pytest.mark.thorough
        cells.append(pytest.param(*cell, marks=marks, id="-".join(map(named, cell))))
    return pytest.mark.parametrize(tuple(axes), cells)


def named(value) -> str:
    return "-".join(map(str, value.values())) if isinstance(value, dict) else str(value).removeprefix("torch.")
