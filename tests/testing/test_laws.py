"""Every optimizer of the library under every law: one row of a table for each."""

import pytest
import torch

from funcopt import (
    Accumulate,
    Adafactor,
    AdamW,
    Best,
    Cautious,
    Clip,
    ClipAdaptive,
    ClipValue,
    Compensated,
    Ema,
    Lookahead,
    LossScale,
    MasterWeights,
    Partition,
    Plateau,
    ScheduleFree,
    SkipNonfinite,
)
from funcopt._core.types import ELEMENTWISE, Traits
from funcopt.schedules import Cosine
from funcopt.testing import check_optimizer, laws
from funcopt.testing._check import check_law

from ..cases import faded, leaves, tree_map

# A new optimizer or wrapper joins by one line.
SUBJECTS = {
    "AdamW": AdamW(),
    "AdamW, amsgrad, ascending": AdamW(lr=0.1, amsgrad=True, maximize=True, eps=1e-3),
    "AdamW, a count of each leaf": AdamW(betas=(0.5, 0.75), step_per_leaf=True, kernel="plain"),
    "AdamW, tensors": AdamW(
        lr=torch.tensor(0.1, dtype=torch.float64), betas=(0.9, torch.tensor(0.99))
    ),
    "AdamW, stochastic": AdamW(lr=0.1, rounding="stochastic", seed=2**53 - 1),
    "AdamW, stochastic, moments, too": AdamW(lr=0.1, moments=None, rounding="stochastic"),
    "AdamW, moments in bfloat16": AdamW(lr=0.1, moments=torch.bfloat16, amsgrad=True),
    "AdamW, moments in float16": AdamW(lr=0.1, moments=torch.float16),
    "AdamW, moments in float32": AdamW(lr=0.1, moments=torch.float32, step_per_leaf=True),
    "Ema, stochastic": Ema(AdamW(lr=0.1, rounding="stochastic", seed=1), decay=0.75),
    "Partition": Partition({"all": AdamW(lr=0.1)}, lambda name, leaf: "all"),
    "AdamW, a schedule": AdamW(lr=lambda step: 0.1 / (1 + step), kernel="foreach"),
    "AdamW, a warmup in tensors": AdamW(lr=Cosine(torch.tensor(0.1), steps=5, warmup_steps=2)),
    "Clip": Clip(AdamW(lr=0.1), max_norm=0.5),
    "Clip, skipping": Clip(AdamW(lr=0.1, amsgrad=True), torch.tensor(2.0), nonfinite="skip"),
    "Clip, largest element": Clip(AdamW(lr=0.1), max_norm=0.5, norm_type=float("inf")),
    "Accumulate": Accumulate(AdamW(lr=0.1), every=2),
    "Accumulate, of counts of each leaf": Accumulate(AdamW(step_per_leaf=True), torch.tensor(2.0)),
    "Accumulate, of a ClipValue": Accumulate(ClipValue(AdamW(lr=0.1), 0.5), 2),
    "ClipAdaptive": ClipAdaptive(AdamW(lr=0.1), clipping=0.1),
    "ClipValue": ClipValue(AdamW(lr=0.1), max_value=0.5),
    "Ema": Ema(AdamW(lr=0.1), decay=0.75),
    "Ema, with the first, of a tensor": Ema(AdamW(lr=0.1), torch.tensor(0.5), debias=False),
    "Ema, of a schedule, accumulated": Accumulate(Ema(AdamW(), lambda n: n / (n + 2)), 2),
    "Lookahead": Lookahead(AdamW(lr=0.1), every=2),
    "Lookahead, restarting": Lookahead(AdamW(lr=0.1), torch.tensor(2.0), reset_state=True),
    "Lookahead, of an Ema": Lookahead(Ema(AdamW(lr=0.1), 0.5), 2, 0.75, reset_state=True),
    "Best": Best(AdamW(lr=0.1), patience=2),
    "Plateau": Plateau(AdamW(lr=0.1)),
    "Plateau, of a tensor, with schedules": Best(
        Plateau(AdamW(lr=torch.tensor(0.1)), factor=lambda n: 1 / (n + 2), min_lr=0.01)
    ),
    "MasterWeights": MasterWeights(AdamW(lr=0.1)),
    "MasterWeights, of a Clip, averaged": Ema(MasterWeights(Clip(AdamW(lr=0.1), 0.5)), 0.75),
    "Compensated": Compensated(AdamW(lr=0.1)),
    "Compensated, accumulated": Accumulate(Compensated(AdamW(lr=0.1)), 2),
    "Cautious": Cautious(AdamW(lr=0.1)),
    "Cautious, with decay": Cautious(AdamW(), True, False, lambda n: 1 / (n + 2)),
    "ScheduleFree": ScheduleFree(AdamW(lr=0.1)),
    "ScheduleFree, of numbers": ScheduleFree(
        AdamW(lr=lambda n: 0.1 / (n + 1)), torch.tensor(0.5), lambda n: 1 / (n + 2)
    ),
    "Transform": faded(AdamW(lr=0.1)),
    "SkipNonfinite": SkipNonfinite(AdamW(lr=0.1)),
    "SkipNonfinite, at most so often": SkipNonfinite(AdamW(amsgrad=True), torch.tensor(2.0)),
    "LossScale": LossScale(AdamW(lr=0.1), init_scale=4.0, growth_interval=1),
    "LossScale, tensors": LossScale(
        AdamW(), torch.tensor(2.0), growth_factor=torch.tensor(4.0), growth_interval=1
    ),
}


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("name", SUBJECTS)
def test_every_law_holds_or_does_not_apply(name, law, examples):
    verdict = check_law(law, SUBJECTS[name], max_examples=examples(law, by_night=200))
    assert verdict.status in ("holds", "not applicable"), verdict


OF_CHANCE = (laws.small_steps_add_up, laws.random_bits_go_by_key)


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_every_law_applies_to_a_plain_adamw_but_those_of_chance(law, examples):
    number = examples(law, by_night=100)
    status = check_law(law, AdamW(), max_examples=number, like=torch.optim.AdamW).status
    assert status == ("not applicable" if law in OF_CHANCE else "holds")


@pytest.mark.parametrize("law", OF_CHANCE, ids=lambda law: law.__name__)
@pytest.mark.parametrize("kernel", ["auto", "plain"])
def test_laws_of_chance_apply_to_one_that_rounds_by_chance(law, kernel):
    opt = AdamW(rounding="stochastic", seed=7, kernel=kernel)
    assert check_law(law, opt).status == "holds"


@pytest.mark.parametrize("wrapper", [MasterWeights, Compensated])
def test_small_steps_add_up_where_they_are_kept_beside_the_parameters(wrapper):
    assert check_law(laws.small_steps_add_up, wrapper(AdamW())).status == "holds"


class SaysThatSmallStepsAddUp(AdamW):
    traits = Traits(elementwise=True, small_steps_add_up=True)


class SaysThatItRoundsByChance(AdamW):
    """Keeps moments in 16 bits, and rounds them to the nearest number."""

    def init(self, params):
        return AdamW(moments=None).init(params)

    def update(self, grads, state, params):
        nearest = AdamW(self.lr, self.betas, self.eps, self.weight_decay, moments=None)
        return nearest.update(grads, state, params)


def test_who_claims_more_than_16_bits_keep_is_found():
    found = check_law(laws.small_steps_add_up, SaysThatSmallStepsAddUp(), shrink=False)
    assert found.status == "fails"
    assert "got a mean of 1, expected 0.9" in found.detail
    claims = SaysThatItRoundsByChance(rounding="stochastic")
    found = check_law(laws.moments_follow_gradients, claims, shrink=False)
    assert found.status == "fails"
    assert "got a mean of 0.984375, expected 1" in found.detail  # where the first moment stops


def test_at_a_kink_there_is_no_derivative_to_judge():
    """A second gradient like the first makes the root mean square of the step 1, its bound."""
    one = torch.ones(3)
    with pytest.raises(laws.NotApplicable, match="slopes to both sides differ"):
        laws.gradient_matches_differences(Adafactor(), one, [one, one])
    laws.gradient_matches_differences(Adafactor(), one, [one, 2 * one])
    laws.gradient_matches_differences(Adafactor(), one, [2 * one, one])


def test_moments_without_elements_are_not_judged():
    for law in (laws.moments_follow_gradients, laws.moments_have_room):
        law(Adafactor(), torch.ones(3), [torch.ones(3)] * 2)


def test_moments_in_16_bits_rounded_to_the_nearest_are_not_judged():
    opt = AdamW(moments=None)
    for law in (laws.moments_follow_gradients, laws.moments_have_room):
        assert check_law(law, opt).status == "not applicable"
    stochastic = AdamW(moments=None, rounding="stochastic")
    assert check_law(laws.moments_follow_gradients, stochastic).status == "holds"


def test_what_a_lookahead_takes_back_is_not_held_against_the_bits():
    opt = Lookahead(AdamW(rounding="stochastic"), 2)
    for law in OF_CHANCE:
        assert check_law(law, opt).status == "not applicable"


@pytest.mark.parametrize("law", [laws.leaves_are_independent, laws.elements_are_independent])
@pytest.mark.parametrize("wrapper", [SkipNonfinite, LossScale])
def test_what_acts_on_overflow_alone_couples_nothing_else(wrapper, law):
    """They say nothing of themselves, since one leaf's overflow stops the others."""
    said = type("Said", (wrapper,), {"traits": ELEMENTWISE})
    assert check_law(law, said(AdamW(lr=0.1)), max_examples=15).status == "holds"


class ByRows(AdamW):
    """Takes from each row of a gradient its mean, and says nothing of it."""

    traits = Traits()

    def update(self, grads, state, params):
        centred = tree_map(lambda g: g - g.mean(0) if g.ndim == 2 and len(g) else g, grads)
        return super().update(centred, state, params)


class SaysTooMuch(ByRows):
    traits = Traits(elementwise=True)


class ByNorm(AdamW):
    """Looks at all gradients together, and says nothing of it."""

    traits = Traits()

    def update(self, grads, state, params):
        size = 1 + sum(g.abs().double().square().sum() for g in leaves(grads))
        return super().update(tree_map(lambda g: (g / size).to(g.dtype), grads), state, params)


class SaysTooMuchOfLeaves(ByNorm):
    traits = Traits(leafwise=True)


def test_an_optimizer_is_held_to_what_it_says_of_leaves_and_elements():
    by_rows, by_norm = ByRows(lr=0.1), ByNorm(lr=0.1)
    names, alone, stacked = (
        laws.names_do_not_matter,
        laws.leaves_are_independent,
        laws.elements_are_independent,
    )
    assert check_law(names, by_rows).status == check_law(names, by_norm).status == "holds"
    unsaid = check_law(stacked, by_rows)
    assert (unsaid.status, unsaid.detail) == (
        "not applicable",
        "it does not say that each element moves by itself, by traits = Traits(elementwise=True) "
        "in its class",
    )
    unsaid = check_law(alone, by_norm)
    assert (unsaid.status, unsaid.detail) == (
        "not applicable",
        "it does not say that each leaf moves by itself, by traits = Traits(leafwise=True) in "
        "its class",
    )
    assert check_law(stacked, SaysTooMuch(lr=0.1)).status == "fails"
    assert check_law(alone, SaysTooMuchOfLeaves(lr=0.1)).status == "fails"


class Overflows(Best):
    """Has a best score that is infinite from the start, and a count that becomes so."""

    def update(self, grads, state, params):
        moved, state = super().update(grads, state, params)
        return moved, state._replace(n_worse=torch.full_like(state.n_worse, torch.inf))


def test_only_what_is_infinite_at_first_may_be_infinite():
    verdict = check_law(laws.survives_zero_gradients, Overflows(AdamW()), max_examples=2)
    assert verdict.status == "fails"
    assert "state.n_worse: got inf" in verdict.detail


class TakesNoExtras(AdamW):
    def update(self, grads, state, params):
        return super().update(grads, state, params)


class CountsWithoutMoving(AdamW):
    def update(self, grads, state, params, active=True):
        moved, new = super().update(grads, state, params, active=active)
        return moved, new._replace(step=state.step + 1)


def test_only_who_takes_active_is_held_to_it():
    law = laws.inactive_updates_change_nothing
    verdict = check_law(law, TakesNoExtras(), max_examples=2)
    assert (verdict.status, verdict.detail) == ("not applicable", "its update takes no active=")
    verdict = check_law(law, CountsWithoutMoving(), max_examples=2)
    assert verdict.status == "fails"
    assert "(active=False): step 1, state.step: got 1, expected 0" in verdict.detail


class Zipped(AdamW):
    """Pairs the gradients that there are with the first leaves, in order."""

    def update(self, grads, state, params):
        found = iter([grad for grad in grads.values() if grad is not None])
        return super().update({name: next(found, None) for name in params}, state, params)


class StillDecays(AdamW):
    """Takes a gradient that is missing for zero, by which weight decay moves the leaf."""

    def update(self, grads, state, params):
        filled = {n: torch.zeros_like(params[n]) if g is None else g for n, g in grads.items()}
        return super().update(filled, state, params)


class CountsMissing(AdamW):
    """Counts an update twice if a gradient is missing."""

    def update(self, grads, state, params):
        moved, new = super().update(grads, state, params)
        missing = any(grad is None for grad in grads.values())
        return moved, new._replace(step=new.step + 1) if missing else new


class RaisesAtNone(AdamW):
    def update(self, grads, state, params):
        return super().update({name: 1 * grad for name, grad in grads.items()}, state, params)


def test_a_gradient_that_is_missing_moves_no_other_leaf():
    law, w = laws.missing_gradients_leave_others_alone, {"w": torch.tensor([1.0, -2.0])}
    steps = [{"w": torch.tensor([0.5, 0.25])}, {"w": torch.tensor([-1.0, 0.125])}]
    law(AdamW(lr=0.1), w, steps)
    prefix = r"\(grads\['leaf 0'\] is None\): step 1"
    for opt, message in (
        (Zipped(lr=0.1), rf"{prefix}, params\['leaf 0'\]: got 0.898"),
        (StillDecays(lr=0.1, weight_decay=0.5), rf"{prefix}, params\['leaf 0'\]: got 0.949"),
        (CountsMissing(lr=0.1), rf"{prefix}, state.step: got 2, expected 1"),
    ):
        with pytest.raises(laws.LawBroken, match=message):
            law(opt, w, steps)
    law(StillDecays(lr=0.1, weight_decay=0.0), w, steps)  # moments stay zero, and so the leaf
    with pytest.raises(
        laws.NotApplicable, match="no gradient that is None: TypeError: unsupported"
    ):
        law(RaisesAtNone(), w, steps)
    with pytest.raises(laws.NotApplicable, match="treats leaves by their names"):
        law(Partition({"all": AdamW()}, lambda name, leaf: "all"), w, steps)


class Remembers(AdamW):
    """Adds to its second moment nothing of the parameters, but their history."""

    def update(self, grads, state, params):
        moved, new = super().update(grads, state, params)
        follow = {name: own + 0 * params[name] for name, own in new.exp_avg_sq.items()}
        return moved, new._replace(exp_avg_sq=follow)


class StartsWithHistory(AdamW):
    def init(self, params):
        state = super().init(params)
        return state._replace(exp_avg={name: 0 * leaf for name, leaf in params.items()})


def test_a_state_with_a_history_of_parameters_is_found():
    w, law = {"w": torch.ones(2)}, laws.state_keeps_no_history
    law(AdamW(), w, [w, w])
    law(Ema(Lookahead(MasterWeights(AdamW()), 2)), w, [w, w])
    with pytest.raises(laws.LawBroken, match=r"step 1, state.exp_avg_sq\['w'\]: .* AddBackward0"):
        law(Remembers(), w, [w, w])
    with pytest.raises(laws.LawBroken, match=r"step 0, state.exp_avg\['w'\]: .* MulBackward0"):
        law(StartsWithHistory(), w, [w, w])


def test_without_a_reference_the_law_of_references_does_not_apply():
    verdict = check_law(laws.matches_reference, AdamW(), max_examples=2)
    assert verdict.status == "not applicable"
    assert "check_optimizer(opt, like=...)" in verdict.detail


def test_a_slope_that_is_wrong_is_shown_as_a_slope():
    class Detaching(AdamW):
        def update(self, grads, state, params):
            moved, state = super().update(grads, state, params)
            return {n: p + 0.5 * (params[n] - params[n].detach()) for n, p in moved.items()}, state

    w = {"w": torch.ones(2)}
    message = (
        r"step 2, the slope of the sum of squares of params, with respect to a factor .*: got a"
    )
    with pytest.raises(laws.LawBroken, match=f"{message} slope of .*, that of differences"):
        laws.gradient_matches_differences(Detaching(), w, [w, w])


def test_a_class_that_has_a_name_of_funcopts_is_told_apart():
    adam = type("Adam", (torch.optim.SGD,), {})
    found = check_optimizer(adam, laws=[laws.first_step_is_sign, laws.matches_torch]).skipped
    assert all("a class of that name, but none of funcopt's" in why for why in found.values())
    assert len(found) == 2


def test_without_an_oracle_the_law_of_oracles_does_not_apply():
    verdict = check_law(laws.matches_oracle, Clip(AdamW(), 1.0), max_examples=2)
    assert (verdict.status, verdict.detail) == (
        "not applicable",
        "no oracle is registered for Clip",
    )


class Rounding(AdamW):
    """Computes float32 in bfloat16."""

    def update(self, grads, state, params):
        moved, state = super().update(grads, state, params)
        return tree_map(
            lambda p: p.bfloat16().float() if p.dtype is torch.float32 else p, moved
        ), state


def test_what_loses_digits_does_not_agree_with_itself_in_float64():
    law = laws.agrees_with_itself_in_float64
    assert check_law(law, Rounding(lr=0.1)).status == "fails"
    assert check_law(law, Clip(AdamW(lr=0.1), 1.0)).status == "holds"


def test_a_broken_law_names_law_step_path_and_both_values():
    class Adrift(AdamW):
        def update(self, grads, state, params):
            moved, state = super().update(grads, state, params)
            return {name: p + state.step for name, p in moved.items()}, state

    params = {"w": torch.ones(2)}
    with pytest.raises(laws.LawBroken) as broken:
        laws.zero_lr_moves_nothing(Adrift(), params, [params, params])
    message = str(broken.value)
    assert message == "zero_lr_moves_nothing: step 1, params['w']: got 2, expected 1 at index (0,)"
