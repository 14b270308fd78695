"""Living beside torch.optim: its state dicts, read and written, and checkpoints of any state.

A run can be taken over from `torch.optim.AdamW`, `Adam`, `SGD`, `NAdam`, `RAdam`, `RMSprop`,
`Adagrad`, `Adafactor` or `Muon` and handed back at any step; what goes on is bit by bit what would
have been, or as near as `from_torch` says. Param groups are the groups of a `Partition`. A state
becomes a flat dict from path to tensor, which `torch.save`, safetensors and
`torch.distributed.checkpoint` all take as it is.

Example:
    >>> import torch
    >>> from funcopt import interop
    >>> model = torch.nn.Linear(2, 1)
    >>> theirs = torch.optim.AdamW(model.named_parameters(), lr=0.1)
    >>> params = dict(model.named_parameters())
    >>> opt, state = interop.from_torch(theirs, params)
    >>> grads = {name: torch.ones_like(param) for name, param in params.items()}
    >>> params, state = opt.update(grads, state, params)
    >>> theirs.load_state_dict(interop.to_torch(opt, state, params))
    >>> sorted(interop.to_state_dict(state))[:3]
    ['funcopt.format', "state.exp_avg['bias']", "state.exp_avg['weight']"]

State dicts of other libraries are not those of `torch.optim.AdamW`, even where names are the same.
What they hold, in the versions that were looked at, and how torch's moments are had from it:

- torch-optimi 0.3.3: `exp_avg`, `exp_avg_sq` with their bias corrected, and in the param group
  `step`, `beta1`, `beta2`. Torch's are these times `1 - beta1**step` and `1 - beta2**step`. Under
  `decouple_lr` torch's weight decay is `weight_decay / max_lr`.
- `StableAdamW` of pytorch_optimizer 4.1.0: the same, with `betas` in the param group. It lowers the
  learning rate of a leaf whose gradients grow, which AdamW does not. (`AdamW` there is torch's.)
- `AdamW` of heavyball 3.2.1: the same, as `state[i][0]["update_by_adam_exp_avg_0"]` and
  `..._exp_avg_sq_0`, and in the param group `step_count`.
- bitsandbytes 0.50.2: `step`, and under `"__bnb_optimizer_quant_state__"` `state1` and `state2`,
  which are torch's moments. Those of uint8 become so by `dequantize_blockwise(state1,
  absmax=absmax1, code=qmap1, blocksize=256)` of `bitsandbytes.functional`.
- torchao 0.18.0: torch's moments, quantized. `load_state_dict` of a `torch.optim.AdamW` takes them.
- schedulefree 1.4.1: `z`, `exp_avg_sq`, and no first moment. Begin anew from the parameters that
  there are after its `eval()`.

Put torch's moments into the state dict of a new `torch.optim.AdamW` that has the same
hyperparameters, and take over that. Going on then differs from going on there by rounding, which is
that of 8 or 4 bits where moments were kept in those. For optimi's:

    >>> group = {"beta1": 0.9, "beta2": 0.99, "step": torch.tensor(5)}
    >>> theirs = {i: {"exp_avg": torch.ones(2), "exp_avg_sq": torch.ones(2)} for i in range(2)}
    >>> params = {"w": torch.zeros(2), "v": torch.zeros(2)}
    >>> d = torch.optim.AdamW(params.items(), lr=0.1, betas=(0.9, 0.99)).state_dict()
    >>> for i, own in theirs.items():
    ...     d["state"][i] = {
    ...         "step": group["step"],
    ...         "exp_avg": own["exp_avg"] * (1 - group["beta1"] ** int(group["step"])),
    ...         "exp_avg_sq": own["exp_avg_sq"] * (1 - group["beta2"] ** int(group["step"])),
    ...     }
    >>> opt, state = interop.from_torch(d, params)
    >>> state.exp_avg["w"]
    tensor([0.4095, 0.4095])
"""

from ._checkpoint import from_state_dict, to_state_dict
from ._from_torch import from_torch
from ._to_torch import to_torch

__all__ = ["from_state_dict", "from_torch", "to_state_dict", "to_torch"]
