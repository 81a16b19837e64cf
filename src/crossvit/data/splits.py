"""Which images are held out: the same share of every class, drawn by a seed, with every class on both sides.

Shapes: n images, C classes. A function returns the positions of what is held out, ascending.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Labels = NDArray[np.integer]  # (n,) class numbers


def of_labels(labels: Labels, *, classes: int, held_out: float, seed: int) -> list[int]:
    """One label an image: scikit-learn's stratified split, unless it leaves a rare class out of one side; then the share of
    each class, rounded, but at least one image and all but one at most."""
    from sklearn.model_selection import train_test_split

    count = len(labels)
    size = math.ceil(count * held_out)
    if classes <= size <= count - classes:
        _, test = train_test_split(range(count), test_size=size, stratify=labels, random_state=seed)
        held = np.bincount(labels[test], minlength=classes)
        if held.min() >= 1 and (np.bincount(labels, minlength=classes) - held).min() >= 1:
            return sorted(test)
    generator = np.random.default_rng(seed)
    chosen: list[int] = []
    for label in range(classes):
        own = generator.permutation(np.flatnonzero(labels == label))
        chosen += own[: int(np.clip(round(len(own) * held_out), 1, len(own) - 1))].tolist()
    return sorted(chosen)


def of_groups(
    labels: Labels, groups: Sequence[str], *, classes: int, held_out: float, seed: int
) -> list[int] | None:
    """One label an image and no group on both sides: one of 1 / `held_out` folds of scikit-learn's StratifiedGroupKFold, the
    one whose classes are nearest to the share `held_out`. None where every fold leaves a class out of one side."""
    from sklearn.model_selection import StratifiedGroupKFold

    counts = np.bincount(labels, minlength=classes)
    best: tuple[float, list[int]] | None = None
    folder = StratifiedGroupKFold(fold_count(held_out), shuffle=True, random_state=seed)
    for _, test in folder.split(np.zeros(len(labels)), labels, groups):
        held = np.bincount(labels[test], minlength=classes)
        if held.min() >= 1 and (counts - held).min() >= 1:
            off = float(np.abs(held / counts - held_out).max())
            if best is None or off < best[0]:
                best = off, test.tolist()
    return None if best is None else sorted(best[1])


def fold_count(held_out: float) -> int:
    """Of how many folds the share `held_out` is one."""
    return max(2, round(1 / held_out))


def of_label_sets(
    targets: NDArray[np.uint8], groups: Sequence[str], *, held_out: float, seed: int
) -> list[int] | None:
    """Several labels an image, or none: iterative stratification (Sechidis, Tsoumakas and Vlahavas, 2011) of images, or of
    groups where there are some, which stay whole. None where a class cannot stand on both sides.

    targets: (n, C), 1 where an image has a class. Class after class, the one with the fewest images left first, its images go
    to the side that lacks most of it: the held-out side wants the share `held_out` of each class, rounded, but at least one
    image and all but one at most.
    """
    numbers = (
        np.unique(np.asarray(groups), return_inverse=True)[1] if groups else np.arange(len(targets))
    )
    units = np.zeros((int(numbers.max()) + 1, targets.shape[1] + 1), dtype=np.int64)
    np.add.at(
        units, numbers, np.column_stack((targets, np.ones(len(targets), dtype=np.int64)))
    )  # the last column: images
    counts = units.sum(axis=0)
    wanted = np.clip(np.round(counts * held_out), 1, counts - 1)
    wants = np.stack((counts - wanted, wanted))  # (2, C + 1): what each side still lacks
    order = np.random.default_rng(seed).permutation(len(units))
    side = np.full(len(units), -1)
    while (side < 0).any():
        left = order[side[order] < 0]
        present = units[left].sum(axis=0)
        rarest = (
            int(np.where(present > 0, present, np.iinfo(np.int64).max)[:-1].argmin())
            if present[:-1].any()
            else -1
        )
        own = left[units[left, rarest] > 0]
        for unit in own[
            np.argsort(-units[own, rarest], kind="stable")
        ]:  # large groups first: small ones even it out
            lacks, room = wants[:, rarest], wants[:, -1] / counts[-1]
            side[unit] = int(np.lexsort((room, lacks))[-1])
            wants[side[unit]] -= units[unit]
    _mend(units[:, :-1], side)
    both = [units[side == number, :-1].sum(axis=0) for number in (0, 1)]
    if min(found.min(initial=1) for found in both) < 1:
        return None
    return np.flatnonzero(side[numbers] == 1).tolist()


def _mend(units: NDArray[np.int64], side: NDArray[np.integer]) -> None:
    """Move a unit over for each class that one side lacks, if one can be spared there: changes `side`."""
    for label in range(units.shape[1]):
        for number in (0, 1):
            there = units[side == 1 - number].sum(axis=0)
            if units[side == number, label].any():
                continue
            own = np.flatnonzero((side == 1 - number) & (units[:, label] > 0))
            spared = next(
                (unit for unit in own if (there - units[unit])[units[unit] > 0].min() > 0), None
            )
            if spared is not None:
                side[spared] = number
