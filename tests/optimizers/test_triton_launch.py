"""How the kernel goes to the device: as it was compiled, and by the driver where that can be."""

import ctypes
import types

import pytest
import torch

from funcopt.optimizers import _native
from funcopt.optimizers._adam import triton_launch
from funcopt.optimizers._adam.triton_arguments import bits_of
from funcopt.optimizers._adam.triton_launch import Launch

source = pytest.importorskip("funcopt.optimizers._adam.triton_source")
pytestmark = pytest.mark.skipif(source.triton is None, reason="Triton cannot be imported")

needs_extension = pytest.mark.skipif(_native.extension is None, reason=str(_native.unserved))
TABLE = torch.arange(4)
WORDS = (3, 1, 0.1, -0.0, float("nan"), 2**62, -5)
CONSTANTS = {"DTYPE": "float32", "AMSGRAD": False, "MAXIMIZE": True, "CONDITIONAL": True}

# int cuLaunchKernel(function, grid, threads, shared bytes, stream, arguments, extra)
DRIVER = ctypes.CFUNCTYPE(
    ctypes.c_int,
    ctypes.c_void_p,
    *[ctypes.c_uint] * 7,
    ctypes.c_void_p,
    ctypes.POINTER(ctypes.POINTER(ctypes.c_int64)),
    ctypes.c_void_p,
)


class Driver:
    """A driver that notes what it is given, and says that all is well unless it is told."""

    def __init__(self):
        self.launches, self.says = [], 0
        self._called = DRIVER(self._launch)
        self.address = ctypes.cast(self._called, ctypes.c_void_p).value

    def _launch(self, function, *given):
        *sizes, stream, arguments, extra = given
        words = [arguments[index][0] for index in range(1 + len(WORDS) + 2)]
        self.launches.append((function, sizes, stream, words, extra))
        return self.says


class Kernel:
    """A kernel of Triton that notes its launches, by itself or as it was compiled."""

    def __init__(self):
        self.launches = []
        self.step_kernel = self
        self.watched = False
        self.plain = (77, 128, 32)

    def __getitem__(self, grid):
        self.launches.append([grid])
        return lambda *args, **named: self.launches[-1].extend([args, named]) or self

    def is_compiled(self, kernel):
        return kernel is self

    def plain_launch_of(self, kernel):
        return self.plain

    def launches_are_watched(self):
        return self.watched


@pytest.fixture
def driver(monkeypatch):
    own = Driver()
    monkeypatch.setattr(triton_launch, "_driver", lambda: own.address)
    return own


@needs_extension
def test_the_driver_is_given_all_that_triton_would_give_it(driver):
    kernel = Kernel()
    launch = Launch(kernel, CONSTANTS)
    launch.go(5, 1234, TABLE, *WORDS)
    assert len(kernel.launches) == 1  # which compiles it
    assert not driver.launches
    launch.go(6, 1234, TABLE, *WORDS)
    assert len(kernel.launches) == 1
    words = [TABLE.data_ptr(), *bits_of(WORDS), 0, 0]  # zeros for what a compiler appends
    assert driver.launches == [(77, [6, 1, 1, 128, 1, 1, 32], 1234, words, None)]


@needs_extension
@pytest.mark.parametrize("reason", ["not plain", "watched", "refused", "no driver"])
def test_triton_launches_where_the_driver_is_not_to_be_called(reason, driver, monkeypatch):
    kernel = Kernel()
    if reason == "not plain":
        kernel.plain = None
    if reason == "no driver":
        monkeypatch.setattr(triton_launch, "_driver", lambda: 0)
    launch = Launch(kernel, CONSTANTS)
    launch.go(5, 0, TABLE, *WORDS)
    kernel.watched = reason == "watched"
    driver.says = 201 if reason == "refused" else 0
    launch.go(6, 0, TABLE, *WORDS)
    assert [grid for grid, *_ in kernel.launches] == [(5, 1, 1), (6, 1, 1)]
    assert len(driver.launches) == (1 if reason == "refused" else 0)


def test_a_compiled_kernel_is_given_by_position_what_it_was_given_by_name(driver):
    kernel = Kernel()
    kernel.plain = None
    launch = Launch(kernel, CONSTANTS)
    for _ in range(2):
        launch.go(5, 0, TABLE, *WORDS)
    by_name, by_position = kernel.launches
    assert by_name[1] == (TABLE, *bits_of(WORDS))
    assert by_name[2] == {**CONSTANTS, "num_warps": 4, "enable_fp_fusion": False}
    assert by_position[1:] == [(TABLE, *bits_of(WORDS), *CONSTANTS.values()), {}]


def test_where_nothing_is_compiled_triton_launches_each_time(driver):
    kernel = Kernel()
    kernel.is_compiled = lambda _: False
    launch = Launch(kernel, CONSTANTS)
    for _ in range(2):
        launch.go(5, 0, TABLE, *WORDS)
    assert [len(named) for _, _, named in kernel.launches] == [len(CONSTANTS) + 2] * 2


def compiled(**changed):
    """What Triton keeps of a compiled kernel."""
    known = {
        "num_ctas": 1,
        "num_warps": 4,
        "shared": 32,
        "global_scratch_size": 0,
        "profile_scratch_size": 0,
        "launch_cooperative_grid": False,
        "launch_pdl": False,
    }
    metadata = types.SimpleNamespace(**{**known, **changed})
    return types.SimpleNamespace(_init_handles=lambda: None, metadata=metadata, function=77)


def test_a_plain_launch_is_one_that_wants_no_more_than_that(monkeypatch):
    hooks = types.SimpleNamespace(launch_enter_hook=None, launch_exit_hook=None)
    monkeypatch.setattr(source.triton, "knobs", types.SimpleNamespace(runtime=hooks), raising=False)
    assert source.plain_launch_of(compiled()) == (77, 128, 32)
    for more in ({"num_ctas": 2}, {"global_scratch_size": 8}, {"launch_pdl": True}):
        assert source.plain_launch_of(compiled(**more)) is None
    assert source.plain_launch_of(types.SimpleNamespace()) is None  # another Triton
    assert not source.launches_are_watched()
    hooks.launch_exit_hook = types.SimpleNamespace(calls=[])
    assert not source.launches_are_watched()
    hooks.launch_exit_hook = types.SimpleNamespace(calls=[print])
    assert source.launches_are_watched()
    hooks.launch_enter_hook, hooks.launch_exit_hook = print, None
    assert source.launches_are_watched()


@needs_extension
def test_what_is_no_launch_is_refused(driver):
    launch = _native.extension.launch
    with pytest.raises(TypeError, match="launch takes 6 integers and a tuple of numbers"):
        launch(driver.address, 77)
    with pytest.raises(TypeError, match="launch takes 6 integers and a tuple of numbers"):
        launch(driver.address, 77, 5, 128, 0, 0, [1])
    with pytest.raises(ValueError, match="arguments: must be at most 48, not 49"):
        launch(driver.address, 77, 5, 128, 0, 0, (0,) * 49)
    with pytest.raises(TypeError):
        launch(driver.address, 77, 5, 128, 0, 0, ("1",))
    with pytest.raises(OverflowError):
        launch(driver.address, 77, 5, 128, 0, 0, (2**64,))
    assert not driver.launches
