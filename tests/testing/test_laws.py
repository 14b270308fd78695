"""Every optimizer of the library under every law: one row of a table for each."""

import pytest
import torch

from funcopt import (
    Accumulate,
    AdamW,
    Clip,
    ClipAdaptive,
    ClipValue,
    Ema,
    Lookahead,
    LossScale,
    Partition,
    SkipNonfinite,
)
from funcopt.schedules import Cosine
from funcopt.testing import laws
from funcopt.testing._check import check_law

# A new optimizer or wrapper joins by one line.
SUBJECTS = {
    "AdamW": AdamW(),
    "AdamW, amsgrad, ascending": AdamW(lr=0.1, amsgrad=True, maximize=True, eps=1e-3),
    "AdamW, a count of each leaf": AdamW(betas=(0.5, 0.75), step_per_leaf=True, kernel="plain"),
    "AdamW, tensors": AdamW(
        lr=torch.tensor(0.1, dtype=torch.float64), betas=(0.9, torch.tensor(0.99))
    ),
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


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
def test_every_law_applies_to_a_plain_adamw(law, examples):
    number = examples(law, by_night=100)
    assert check_law(law, AdamW(), max_examples=number).status == "holds"


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
