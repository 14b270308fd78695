"""The three formats that a flat dict of tensors goes into and comes out of, by name."""

import warnings

import safetensors.torch
import torch
import torch.distributed.checkpoint as dcp


def save_torch(d, path):
    torch.save(d, path)


def load_torch(path, _like):
    return torch.load(path, weights_only=True)


def save_safetensors(d, path):
    safetensors.torch.save_file(d, path)


def load_safetensors(path, _like):
    return safetensors.torch.load_file(path)


def save_dcp(d, path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is but one process, as no_dist says
        dcp.save(d, checkpoint_id=path, no_dist=True)


def load_dcp(path, like):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(like, checkpoint_id=path, no_dist=True)
    return like


FORMATS = {
    "torch": (save_torch, load_torch),
    "safetensors": (save_safetensors, load_safetensors),
    "dcp": (save_dcp, load_dcp),
}
