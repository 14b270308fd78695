"""Laws: plain assertion functions `law(opt, params, gradient_sequence)`.

A law says what must hold of any optimizer that has `init` and `update`, or of any that has what the
law speaks of. It takes at least two steps, looks at the state as well as at the parameters, and
raises `LawBroken` with its name, the step, the path and both values, or `NotApplicable` with the
reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..._core.types import Tree
from .._compare import LawBroken, NotApplicable
from ._active import inactive_updates_change_nothing
from ._agreement import (
    agrees_with_itself_in_float64,
    compiles_once,
    kernels_agree,
    matches_oracle,
    matches_torch,
)
from ._algebra import (
    decay_is_decoupled,
    first_step_is_sign,
    maximize_is_minimize_negated,
    scale_invariant,
    zero_lr_moves_nothing,
)
from ._descent import goes_downhill
from ._leaves import elements_are_independent, leaves_are_independent, names_do_not_matter
from ._missing import missing_gradients_leave_others_alone
from ._precision import (
    moments_follow_gradients,
    moments_have_room,
    random_bits_go_by_key,
    small_steps_add_up,
)
from ._purity import (
    bad_trees_raise,
    deterministic,
    inplace_is_pure,
    keeps_structure,
    never_mutates,
    outputs_share_no_memory,
    round_trips,
    state_keeps_no_history,
    survives_zero_gradients,
)
from ._reference import matches_reference
from ._transforms import (
    gradient_is_finite,
    gradient_matches_differences,
    nested_vmap_is_loop,
    per_member_hyperparameters,
    vmap_is_loop,
)

Law = Callable[[Any, Tree, list[Tree]], None]

LAWS: tuple[Law, ...] = (
    never_mutates,
    outputs_share_no_memory,
    state_keeps_no_history,
    deterministic,
    keeps_structure,
    inplace_is_pure,
    round_trips,
    bad_trees_raise,
    missing_gradients_leave_others_alone,
    survives_zero_gradients,
    kernels_agree,
    matches_torch,
    matches_oracle,
    matches_reference,
    agrees_with_itself_in_float64,
    names_do_not_matter,
    leaves_are_independent,
    elements_are_independent,
    vmap_is_loop,
    nested_vmap_is_loop,
    per_member_hyperparameters,
    inactive_updates_change_nothing,
    gradient_is_finite,
    gradient_matches_differences,
    goes_downhill,
    zero_lr_moves_nothing,
    maximize_is_minimize_negated,
    decay_is_decoupled,
    scale_invariant,
    first_step_is_sign,
    small_steps_add_up,
    moments_follow_gradients,
    moments_have_room,
    random_bits_go_by_key,
    compiles_once,
)

# What takes many updates, or a compilation, and looks at few things of a problem.
SLOW: tuple[Law, ...] = (
    small_steps_add_up,
    moments_follow_gradients,
    moments_have_room,
    random_bits_go_by_key,
    compiles_once,
)

__all__ = [
    "LAWS",
    "Law",
    "LawBroken",
    "NotApplicable",
    "agrees_with_itself_in_float64",
    "bad_trees_raise",
    "compiles_once",
    "decay_is_decoupled",
    "deterministic",
    "elements_are_independent",
    "first_step_is_sign",
    "goes_downhill",
    "gradient_is_finite",
    "gradient_matches_differences",
    "inactive_updates_change_nothing",
    "inplace_is_pure",
    "keeps_structure",
    "kernels_agree",
    "leaves_are_independent",
    "matches_oracle",
    "matches_reference",
    "matches_torch",
    "maximize_is_minimize_negated",
    "missing_gradients_leave_others_alone",
    "moments_follow_gradients",
    "moments_have_room",
    "names_do_not_matter",
    "nested_vmap_is_loop",
    "never_mutates",
    "outputs_share_no_memory",
    "per_member_hyperparameters",
    "random_bits_go_by_key",
    "round_trips",
    "scale_invariant",
    "small_steps_add_up",
    "state_keeps_no_history",
    "survives_zero_gradients",
    "vmap_is_loop",
    "zero_lr_moves_nothing",
]
