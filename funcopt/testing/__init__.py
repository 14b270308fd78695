"""A kit to test optimizers with: strategies for their inputs, laws to obey, and a check of all.

Needs hypothesis: `pip install "funcopt[testing]"`. An optimizer needs no more than `init` and
`update` to be tested; laws that speak of what it does not have are reported as not applicable.

Example:
    >>> import funcopt
    >>> from funcopt.testing import check_optimizer, laws
    >>> report = check_optimizer(
    ...     funcopt.AdamW(), laws=[laws.never_mutates, laws.vmap_is_loop], max_examples=5
    ... )
    >>> print(report)
    AdamW: 2 hold
      holds           never_mutates
      holds           vmap_is_loop
"""

from . import laws, oracles, strategies
from ._check import Report, Verdict, check_optimizer, parametrize_laws
from ._compare import LawBroken, NotApplicable
from ._machine import OptimizerMachine

__all__ = [
    "LawBroken",
    "NotApplicable",
    "OptimizerMachine",
    "Report",
    "Verdict",
    "check_optimizer",
    "laws",
    "oracles",
    "parametrize_laws",
    "strategies",
]
