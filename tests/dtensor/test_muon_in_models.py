"""Muon and AdamW train a sharded transformer: by FSDP2, and by tensor parallelism beneath it."""

import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

from funcopt import AdamW, Muon, Partition, muon_label

from ..cases import assert_close, assert_same_bits, tree_map
from ..distributed.harness import run_ranks

WORDS, WIDTH, HEADS, LENGTH = 11, 12, 4, 5
STEPS = 2


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 20), nn.Linear(20, WIDTH)

    def forward(self, x):
        own = self.norm(x)
        heads = [
            layer(own).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        ]
        x = x + self.out(scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(x)))


class Transformer(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def by_fsdp(model):
    """Shard every block by itself, as one does."""
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    return dist.get_rank(), dist.get_world_size()


def by_two_dimensions(model):
    """Cut layers by tensor parallelism, and what comes of that by FSDP2: a mesh of 2x2."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    columns, rows = ColwiseParallel(), RowwiseParallel()
    for block in model.blocks:
        plan = dict.fromkeys(("query", "key", "value", "up"), columns)
        parallelize_module(block, mesh["tp"], {**plan, "out": rows, "down": rows})
        fully_shard(block, mesh=mesh["dp"])  # also its norm, which lies on that dimension alone
    ends = {
        "embed": RowwiseParallel(input_layouts=Replicate()),
        "head": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, mesh["tp"], ends)
    fully_shard(model, mesh=mesh["dp"])
    return mesh.get_coordinate()[0], 2


def optimizer(**options):
    return Partition({"muon": Muon(lr=0.02, **options), "adamw": AdamW(lr=0.01)}, muon_label)


def whole(tree):
    return tree_map(
        lambda x: (x.full_tensor() if isinstance(x, DTensor) else x).detach().clone(), tree
    )


def gradients(model, step, rank=0, world_size=1):
    """Return the mean gradient over a batch, of which each process sees its share."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(WORDS, (4, LENGTH + 1), generator=generator).chunk(world_size)[rank]
    model.zero_grad()
    scores = model(tokens[:, :-1])
    cross_entropy(scores.flatten(0, 1), tokens[:, 1:].flatten()).backward()
    return {name: param.grad for name, param in model.named_parameters()}


def train(model, opt, in_place, share=(0, 1)):
    """Make steps, each that of whole leaves to the bit, and return parameters and state."""
    params = dict(model.named_parameters())
    state = opt.init(params)
    for step in range(STEPS):
        grads = gradients(model, step, *share)
        expected = opt.update(whole(grads), whole(state), whole(params))
        if in_place:
            opt.update_(grads, state, params)
        else:
            moved, state = opt.update(grads, state, params)
            with torch.no_grad():
                for name, new in moved.items():
                    params[name].copy_(new)
        assert_same_bits((whole(params), whole(state)), expected)
    return whole((params, state))


@functools.cache
def on_one_process():
    return train(Transformer().double(), optimizer(ns_dtype=None), in_place=False)


def train_sharded(rank, shard):
    # Iterations in bfloat16 make much of how gradients are rounded, which are summed up in
    # another order here. So each step is held to whole leaves, and the whole run is in float64.
    model = Transformer()
    train(model, optimizer(), in_place=True, share=shard(model))
    model = Transformer().double()
    found = train(model, optimizer(ns_dtype=None), in_place=False, share=shard(model))
    assert_close(found, on_one_process(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(
    ("size", "shard"), [(1, by_fsdp), (2, by_fsdp), (4, by_fsdp), (4, by_two_dimensions)]
)
def test_a_sharded_transformer_is_trained_as_on_one_process(size, shard):
    run_ranks(size, train_sharded, shard)
