"""The types that a checker must find, and the calls that it must accept; they run, too."""

from typing import Any, Literal, NamedTuple, TypeVar, assert_type

import torch
from torch import Tensor

import funcopt
from funcopt import schedules
from funcopt.distributed import LocalUpdates, LocalUpdatesState, Zero1, Zero1State

Params = dict[str, Tensor]
ParamsT = TypeVar("ParamsT")
StateT = TypeVar("StateT")


def params_and_grads() -> tuple[Params, Params]:
    return {"w": torch.ones(3, 2)}, {"w": torch.ones(3, 2)}


def test_a_wrapper_knows_the_optimizer_and_the_state_within() -> None:
    params, grads = params_and_grads()
    opt = funcopt.Clip(funcopt.AdamW(lr=1e-3), 1.0)
    assert_type(opt, funcopt.Clip[funcopt.AdamW])
    assert_type(opt.inner.amsgrad, bool)
    state = opt.init(params)
    assert_type(state, funcopt.ClipState[funcopt.AdamWState])
    assert_type(state.inner, funcopt.AdamWState)
    assert_type(state.norm, Tensor)
    assert_type(
        opt.update(grads, state, params), tuple[Params, funcopt.ClipState[funcopt.AdamWState]]
    )
    assert_type(
        opt.update_(grads, state, params, active=True, value=0.5),
        tuple[Params, funcopt.ClipState[funcopt.AdamWState]],
    )


def test_wrappers_in_wrappers_are_known_to_any_depth() -> None:
    params, _ = params_and_grads()
    deep = funcopt.Best(
        funcopt.Ema(funcopt.Accumulate(funcopt.Clip(funcopt.SGD(), 1.0), 4), decay=0.9)
    )
    assert_type(
        deep.init(params),
        funcopt.BestState[
            funcopt.EmaState[funcopt.AccumulateState[funcopt.ClipState[funcopt.SGDState]]]
        ],
    )
    assert_type(deep.inner.inner.inner.inner, funcopt.SGD)
    twice = funcopt.Clip(funcopt.Accumulate(funcopt.Clip(funcopt.SGD(), 1.0), 4), 1.0)
    assert_type(twice.init(params).inner.inner.inner, funcopt.SGDState)


def test_every_wrapper_hands_on_the_state_within() -> None:
    params, _ = params_and_grads()
    inner = funcopt.AdamW()
    assert_type(funcopt.Accumulate(inner, 2).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.Best(inner).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.Cautious(inner).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.ClipAdaptive(inner, 0.1).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.ClipValue(inner, 0.1).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.Compensated(inner).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.Ema(inner, 0.9).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.Lookahead(inner).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.LossScale(inner).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.MasterWeights(inner).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.Plateau(inner).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.ScheduleFree(inner).init(params).inner, funcopt.AdamWState)
    assert_type(funcopt.SkipNonfinite(inner).init(params).inner, funcopt.AdamWState)
    changed = funcopt.Transform(inner, lambda grads, own, params: (grads, own))
    assert_type(changed.init(params).inner, funcopt.AdamWState)
    zero = Zero1(inner, None)
    assert_type(zero.init(params), Zero1State[funcopt.AdamWState])
    local = LocalUpdates(inner, 2, None)
    assert_type(local.init(params), LocalUpdatesState[funcopt.AdamWState])


def test_members_have_the_state_of_the_optimizer_within() -> None:
    params, grads = params_and_grads()
    opt = funcopt.Members(funcopt.Clip(funcopt.SGD(lr=torch.tensor([0.1, 0.2, 0.3])), 1.0))
    state = opt.init(params)
    assert_type(state, funcopt.ClipState[funcopt.SGDState])
    assert_type(
        opt.update(grads, state, params), tuple[Params, funcopt.ClipState[funcopt.SGDState]]
    )


def test_groups_of_one_class_are_known_and_those_of_several_are_accepted() -> None:
    params, grads = params_and_grads()
    alike = funcopt.Partition(
        {"decay": funcopt.AdamW(weight_decay=0.1), "no_decay": funcopt.AdamW()}, funcopt.decay_label
    )
    assert_type(alike, funcopt.Partition[funcopt.AdamWState])
    assert_type(alike.init(params).inner, dict[str, funcopt.AdamWState])
    mixed = funcopt.Partition({"muon": funcopt.Muon(), "adamw": funcopt.AdamW()}, {"w": "muon"})
    assert_type(mixed, funcopt.Partition[Any])
    around = funcopt.Clip(alike, 1.0)
    state = around.init(params)
    assert_type(state.inner.inner["decay"], funcopt.AdamWState)
    assert_type(around.update(grads, state, params)[0], Params)


def test_pure_has_the_state_of_torch() -> None:
    params, _ = params_and_grads()
    opt = funcopt.Clip(funcopt.pure(torch.optim.RMSprop, lr=0.1), 1.0)
    assert_type(opt.init(params).inner, funcopt.PureState)


def train(
    opt: funcopt.Optimizer[StateT], grads: ParamsT, params: ParamsT
) -> tuple[ParamsT, StateT]:
    return opt.update(grads, opt.init(params), params)


def test_a_function_of_any_optimizer_keeps_the_types_of_params_and_state() -> None:
    params, grads = params_and_grads()
    assert_type(train(funcopt.SGD(), grads, params), tuple[Params, funcopt.SGDState])
    assert_type(
        train(funcopt.Ema(funcopt.Clip(funcopt.SGD(), 1.0), 0.9), grads, params),
        tuple[Params, funcopt.EmaState[funcopt.ClipState[funcopt.SGDState]]],
    )


def wrapped(opt: funcopt.Optimizer[StateT], params: Params) -> funcopt.ClipState[StateT]:
    return funcopt.Clip(opt, 1.0).init(params)


def test_what_is_generic_may_be_wrapped() -> None:
    params, _ = params_and_grads()
    assert_type(wrapped(funcopt.SGD(), params), funcopt.ClipState[funcopt.SGDState])


def test_a_wrapper_and_a_state_may_be_named_without_what_is_within() -> None:
    params, _ = params_and_grads()
    opt: funcopt.Clip = funcopt.Clip(funcopt.SGD(), 1.0)
    state: funcopt.ClipState = opt.init(params)
    several: list[funcopt.Optimizer[Any]] = [opt, funcopt.SGD(), funcopt.Ema(opt, 0.9)]
    assert len(several) == 3
    assert isinstance(state, funcopt.ClipState)


class CountState(NamedTuple):
    made: Tensor


class Descent:
    """An optimizer of one's own, typed for flat dicts alone."""

    def init(self, params: Params) -> CountState:
        return CountState(torch.zeros(()))

    def update(self, grads: Params, state: CountState, params: Params) -> tuple[Params, CountState]:
        new_params = {name: params[name] - 0.1 * grads[name] for name in params}
        return new_params, CountState(state.made + 1)

    def update_(
        self, grads: Params, state: CountState, params: Params
    ) -> tuple[Params, CountState]:
        for name in params:
            params[name].sub_(0.1 * grads[name])
        state.made.add_(1)
        return params, state


def test_an_optimizer_for_dicts_alone_may_be_wrapped() -> None:
    params, grads = params_and_grads()
    opt = funcopt.Clip(Descent(), 1.0)
    params, state = opt.update(grads, opt.init(params), params)
    assert_type(state.inner, CountState)
    group = funcopt.Partition({"all": Descent()}, {"w": "all"})
    assert_type(group.init(params).inner["all"].made, Tensor)
    assert funcopt.find(opt.init(params), "norm", opt).keys() == {"norm"}
    like: funcopt.OptimizerLike[CountState] = Descent()
    assert_type(funcopt.Accumulate(like, 2).init(params).inner, CountState)


def halved(count: Tensor) -> Tensor:
    return 0.5**count


def test_a_schedule_takes_numbers_and_tensors() -> None:
    schedule = schedules.Cosine(peak=1.0, steps=10)
    assert_type(schedule(5), float | Tensor)
    assert_type(schedule(5.0), float | Tensor)
    assert_type(schedule(torch.tensor(5)), float | Tensor)
    assert_type(schedule.peak, float | Tensor)
    given: list[funcopt.Schedule] = [schedule, halved, lambda count: 1 / (1 + count)]
    for own in given:
        assert_type(own(torch.tensor(5)), float | Tensor)
        assert_type(own(5), float | Tensor)
        funcopt.AdamW(lr=own, betas=(0.9, own), weight_decay=own)
    schedules.Join((schedule, halved), (10,))(3)
    lr = funcopt.Ema(funcopt.AdamW(lr=schedule), 0.9).inner.lr
    assert callable(lr)
    lr(5)


def test_hyperparameters_are_numbers_tensors_schedules_or_trees() -> None:
    funcopt.AdamW(lr=1, weight_decay=torch.tensor(0.1))
    funcopt.AdamW(lr={"w": 0.1, "b": torch.tensor(0.2)})
    lr = funcopt.SGD(lr=0.5).lr
    assert isinstance(lr, float)
    assert_type(lr, float)


def test_kernels_are_words() -> None:
    assert_type(
        funcopt.AdamW().kernel,
        Literal["auto", "native", "triton", "fused", "foreach", "plain"],
    )
    assert_type(funcopt.Clip(funcopt.SGD(), 1.0).nonfinite, Literal["propagate", "skip"])


def test_what_reads_and_edits_keeps_the_type() -> None:
    params, _ = params_and_grads()
    opt = funcopt.Ema(funcopt.SGD(lr=0.5), 0.9)
    assert_type(funcopt.replace(opt, "lr", 0.1), funcopt.Ema[funcopt.SGD])
    assert_type(funcopt.averaged(opt.init(params), params), Params)
    assert_type(funcopt.members.stack([opt, opt]), funcopt.Ema[funcopt.SGD])
