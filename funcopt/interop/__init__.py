"""Living beside torch.optim: its state dicts, read and written, and checkpoints of any state.

A run can be taken over from `torch.optim.AdamW` and handed back at any step; what goes on is bit by
bit what would have been. Param groups are the groups of a `Partition`. A state becomes a flat dict
from path to tensor, which `torch.save`, safetensors and `torch.distributed.checkpoint` all take as
it is.

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
"""

from ._checkpoint import from_state_dict, to_state_dict
from ._from_torch import from_torch
from ._to_torch import to_torch

__all__ = ["from_state_dict", "from_torch", "to_state_dict", "to_torch"]
