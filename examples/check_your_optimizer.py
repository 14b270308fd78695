"""Test an optimizer of your own with funcopt's kit: Lion in 15 lines, and four ways to spoil it.

The kit needs an optimizer's `init` and `update`, and no more. A dataclass with the usual field
names (`lr`, `maximize`, ...) is also held to what those names promise, and one that says of itself
that it is `elementwise` (or `leafwise`) to that. The script prints a report for a Lion that is
right, and for each of four with a planted bug the laws that it breaks, with the smallest example
found.

    pip install "funcopt[testing]"
    python examples/check_your_optimizer.py
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from typing import Any, ClassVar

import torch
from optree import tree_map
from torch import Tensor

from funcopt.extend import Traits
from funcopt.testing import check_optimizer

Tree = Any


@dataclasses.dataclass(frozen=True)
class Lion:
    """Lion: the sign of a mean (Chen et al., Symbolic Discovery of Optimization Algorithms)."""

    # Each element moves by its own gradient, mean and value.
    traits: ClassVar[Traits] = Traits(elementwise=True)

    lr: float | Tensor = 1e-2
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.1

    def init(self, params: Tree) -> Tree:
        return tree_map(torch.zeros_like, params)

    def update(self, grads: Tree, means: Tree, params: Tree) -> tuple[Tree, Tree]:
        return tree_map(self.move, params, grads, means), tree_map(self.average, means, grads)

    def move(self, p: Tensor, g: Tensor, m: Tensor) -> Tensor:
        if g.shape != p.shape:
            raise ValueError(f"a gradient of shape {g.shape} for a parameter of {p.shape}")
        return (
            p - self.lr * (self.sign(torch.lerp(m, g, 1 - self.betas[0])) + self.weight_decay * p)
        ).to(p.dtype)

    def average(self, m: Tensor, g: Tensor) -> Tensor:
        return torch.lerp(m, g, 1 - self.betas[1])

    def sign(self, mixed: Tensor) -> Tensor:
        return torch.sgn(mixed)


class WritesInPlace(Lion):
    """The running mean is written over."""

    def average(self, m: Tensor, g: Tensor) -> Tensor:
        return m.lerp_(g, 1 - self.betas[1])


class DividesByZero(Lion):
    """The sign is had by dividing, and a zero gradient has none."""

    def sign(self, mixed: Tensor) -> Tensor:
        return mixed / mixed.abs()


class Ascends(Lion):
    """The sign is that of the way up."""

    def sign(self, mixed: Tensor) -> Tensor:
        return -torch.sgn(mixed)


class ForgetsTheRate(Lion):
    """The decay is applied whatever the learning rate."""

    def move(self, p: Tensor, g: Tensor, m: Tensor) -> Tensor:
        return super().move(p, g, m) - self.weight_decay * p


def main() -> None:
    parser = argparse.ArgumentParser(
        description=str(__doc__).partition("\n")[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--examples", type=int, default=25, help="problems to try for each law")
    examples = parser.parse_args().examples
    if examples < 1:
        parser.error(f"argument --examples: {examples} is not a whole number of at least 1")

    report = check_optimizer(Lion(), max_examples=examples)
    print(report)
    caught = [report.ok]
    for wrong in (WritesInPlace(), DividesByZero(), Ascends(), ForgetsTheRate()):
        report = check_optimizer(wrong, max_examples=examples)
        caught.append(not report.ok)
        print(f"\n{report.optimizer} breaks {len(report.broken)} laws. {wrong.__doc__}")
        for verdict in report.verdicts:
            if verdict.law in report.broken:
                print(verdict)
    if not all(caught):
        sys.exit("\nThe kit was wrong about at least one of them.")


if __name__ == "__main__":
    main()
