"""States through torch.distributed.checkpoint: other numbers of processes, training, and deaths."""

import os
import pathlib
import signal
import threading
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from funcopt import AdamW
from funcopt.distributed import Zero1
from funcopt.interop import from_state_dict, to_state_dict

from ..interop.formats import load_dcp
from .harness import RankError, run_ranks

OPT = AdamW(lr=0.1, amsgrad=True)

# Uneven over two and four either way, of one element, of none, of shape ().
SHAPES = {"tall": (5, 3), "wide": (2, 7), "b": (3,), "one": (1,), "empty": (0, 4), "scalar": ()}
OTHERS = {"tall": torch.complex64, "b": torch.complex64, "wide": torch.bfloat16}
WAYS = {"rows": Shard(0), "columns": Shard(1), "replicated": Replicate()}


def make(seed):
    g = torch.Generator().manual_seed(seed)
    tree = {name: torch.randn(shape, generator=g) for name, shape in SHAPES.items()}
    for name, dtype in OTHERS.items():
        tree[f"{name} {dtype}"] = torch.randn(SHAPES[name], generator=g, dtype=dtype)
    return tree


def lay(tree, mesh, way):
    """Distribute the leaves of a tree that have the dimension; of others the last, or none."""
    laid = {}
    for name, leaf in tree.items():
        placement = WAYS[way]
        if way == "columns":
            placement = Shard(min(1, leaf.ndim - 1))
        if leaf.ndim == 0:
            placement = Replicate()
        laid[name] = distribute_tensor(leaf, mesh, [placement])
    return laid


def new_runs(mesh, way="rows"):
    """What a checkpoint has here: a run on DTensors, and the state of a Zero1."""
    params = make(0) if mesh is None else lay(make(0), mesh, way)
    zero1 = Zero1(OPT, mesh, bucket_bytes=64)
    return {"params": params, "state": OPT.init(params), "zero1": zero1.init(make(0))}


def train_(runs, mesh, way="rows", steps=range(3)):
    """Update all in place."""
    zero1, plain = Zero1(OPT, mesh, bucket_bytes=64), make(0)
    for step in steps:
        grads = make(1 + step)
        OPT.update_(lay(grads, mesh, way), runs["state"], runs["params"])
        zero1.update_(grads, runs["zero1"], plain)
    return runs


def wholes(runs):
    """All entries of a checkpoint, gathered, in memory of their own."""
    return {
        key: (leaf.full_tensor() if isinstance(leaf, DTensor) else leaf).clone()
        for key, leaf in to_state_dict(runs).items()
    }


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, leaf in found.items():
        assert leaf.dtype == expected[key].dtype, key
        assert torch.equal(leaf, expected[key]), key


def reload(directory, template):
    entries = to_state_dict(template)
    dcp.load(entries, checkpoint_id=directory)
    return from_state_dict(template, entries)


# ---------------------------------------------------------------- other processes and placements


def save(rank, directory, way):
    mesh = init_device_mesh("cpu", (2,))
    runs = train_(new_runs(mesh, way), mesh, way)
    dcp.save(to_state_dict(runs), checkpoint_id=directory)
    return wholes(runs)


def load(rank, directories, expected):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for saved, directory in directories.items():
        for way in WAYS:
            template = new_runs(mesh, way)
            found = reload(directory, template)
            assert_same(wholes(found), expected[saved])
            for name, leaf in found["params"].items():
                assert leaf.placements == template["params"][name].placements, name
                assert found["state"].exp_avg[name].placements == leaf.placements, name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Directories, and what was saved there on two processes, by how it lay."""
    directories = {way: str(tmp_path_factory.mktemp(way)) for way in WAYS}
    return directories, {way: run_ranks(2, save, path, way)[0] for way, path in directories.items()}


@pytest.mark.by_day(2)
@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_what_two_processes_saved_is_the_same_bits_on_any_number_however_it_lies(saved, world_size):
    run_ranks(world_size, load, *saved)


def test_what_two_processes_saved_is_the_same_bits_in_plain_tensors_of_a_process_alone(saved):
    for way, directory in saved[0].items():
        found = load_dcp(directory, to_state_dict(new_runs(None)))
        assert_same(wholes(from_state_dict(new_runs(None), found)), saved[1][way])


# ------------------------------------------------------------------------------- complex leaves


def check_complex_entries(rank):
    mesh = init_device_mesh("cpu", (2, 2))
    full = torch.randn(3, 5, dtype=torch.complex64, generator=torch.Generator().manual_seed(0))
    rows, columns, all_of_it = WAYS.values()
    for placements in [(rows, columns), (columns, all_of_it), (all_of_it, rows)]:
        for made in (full, full.t().contiguous().t()):
            leaf = distribute_tensor(made, mesh, placements)
            entry = check_complex_entry(leaf, made)
            assert entry.to_local().data_ptr() == leaf.to_local().data_ptr()
        check_complex_entry(leaf.conj(), made.conj())


def check_complex_entry(leaf, whole):
    entries = to_state_dict({"w": leaf})
    entry = entries["torch.view_as_real(state['w'])"]
    assert entry.placements == leaf.placements
    assert torch.equal(entry.full_tensor(), torch.view_as_real(whole.resolve_conj()))
    found = from_state_dict({"w": torch.zeros_like(leaf)}, entries)["w"]
    assert found.placements == leaf.placements
    assert torch.equal(found.full_tensor(), whole)
    return entry


def test_a_complex_dtensor_keeps_its_placements_as_pairs_and_its_values_on_the_way_back():
    run_ranks(4, check_complex_entries)


# ------------------------------------------------------------------------------ while it trains


def save_while_training(rank, directory):
    """Save, and let no byte be written before training has gone on."""
    mesh = init_device_mesh("cpu", (2,))
    # Of its own: a collective of the save would else be taken for one of an update.
    group = dist.new_group(backend="gloo")
    runs = train_(new_runs(mesh), mesh)
    expected, moved = wholes(runs), threading.Event()
    write = dcp.FileSystemWriter.write_data

    def write_later(*args):
        assert moved.wait(30)
        return write(*args)

    with patch.object(dcp.FileSystemWriter, "write_data", write_later):
        future = dcp.async_save(to_state_dict(runs), checkpoint_id=directory, process_group=group)
        train_(runs, mesh, steps=range(3, 6))
        assert not future.done()
        moved.set()
        future.result()
    assert not torch.equal(
        runs["params"]["tall"].full_tensor(), expected["state['params']['tall']"]
    )
    assert_same(wholes(reload(directory, new_runs(mesh))), expected)


def test_an_asynchronous_save_is_of_the_moment_it_began_though_updates_write_over_it(tmp_path):
    run_ranks(2, save_while_training, str(tmp_path))


# ----------------------------------------------------------------------------- deaths in a save


def save_and_die(rank, directory, victim, moment):
    """Save twice, each time in a directory of its own; the second time a rank dies of it."""
    mesh = init_device_mesh("cpu", (2,))
    runs = train_(new_runs(mesh), mesh)
    dcp.save(to_state_dict(runs), checkpoint_id=f"{directory}/3")
    torch.save(wholes(runs), f"{directory}/expected {rank}")
    train_(runs, mesh, steps=[3])
    going_on = getattr(dcp.FileSystemWriter, moment)

    def die(*args, **kwargs):
        if moment == "write_data":
            going_on(*args, **kwargs)
            for file in pathlib.Path(directory, "4").glob(f"__{rank}_*"):
                os.truncate(file, file.stat().st_size // 2)
        os.kill(os.getpid(), signal.SIGKILL)

    with patch.object(dcp.FileSystemWriter, moment, die if rank == victim else going_on):
        dcp.save(to_state_dict(runs), checkpoint_id=f"{directory}/4")


@pytest.mark.parametrize(
    ("victim", "moment"), [(1, "write_data"), (0, "write_data"), (0, "finish")]
)
def test_a_rank_killed_while_it_saves_leaves_what_was_saved_before(tmp_path, victim, moment):
    with pytest.raises(RankError, match=f"rank {victim} failed:\nIt died with exit code -9"):
        run_ranks(2, save_and_die, str(tmp_path), victim, moment)
    assert list((tmp_path / "4").glob(f"__{victim}_*.distcp"))  # it had begun
    assert newest_whole(tmp_path) == tmp_path / "3"
    expected = torch.load(tmp_path / "expected 0", weights_only=True)
    assert_same(load_dcp(tmp_path / "3", to_state_dict(new_runs(None))), expected)


def newest_whole(directory: pathlib.Path) -> pathlib.Path:
    """As the guide says: what is whole has its metadata, which are written last."""
    return max((path.parent for path in directory.glob("*/.metadata")), key=lambda p: int(p.name))
