#!/usr/bin/env bash
# A C extension that borrows torch's OpenMP threads for a smaller loop ends the others for good.
#
# torch's Linux wheel brings GNU's OpenMP (libgomp.so.1). Code that is to share its threads, rather
# than to keep a second set beside them, finds GOMP_parallel among what libtorch_cpu was linked with
# and calls it. One would think that a team of 2 leaves the other threads waiting for torch's next
# loop. But libgomp ends those that a smaller team leaves over, and the next loop of torch makes new
# ones. A team of the full size, of which some threads have nothing to do, leaves all as they are: so
# torch itself asks for no number of threads.
#
# Seen with torch 2.13.0 (CPU), Python 3.11, Linux x86-64, torch.set_num_threads(4):
#   after a loop of torch                3 threads beside the main one
#   after a region of all threads        the same 3
#   after a region of 2 threads          1 of them
#   after the next loop of torch         3 again, of which 2 are new
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torch==2.13.0
cd "$folder"
"$folder/venv/bin/python" -W ignore - <<'PYTHON'
import ctypes
import os
import time
from pathlib import Path

import torch

torch.set_num_threads(4)
library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
region = library.GOMP_parallel  # of a function, its argument, so many threads (0: all), flags
region.argtypes = ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint
region.restype = None
nothing = ctypes.cast(library.omp_get_num_threads, ctypes.c_void_p)  # what the threads do
others = set(os.listdir("/proc/self/task"))
tensor = torch.empty(1 << 22)


def threads():
    time.sleep(0.3)  # until those that end are gone
    return set(os.listdir("/proc/self/task")) - others


tensor.zero_()
first = threads()
region(nothing, None, 0, 0)
all_came = threads()
region(nothing, None, 2, 0)
two_came = threads()
tensor.zero_()
again = threads()

print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
print(f"after a loop of torch: {len(first)} threads beside the main one")
print(f"after a region of all threads: {len(all_came)}, the same: {all_came == first}")
print(f"after a region of 2 threads: {len(two_came)}")
print(f"after the next loop of torch: {len(again)}, of which {len(again - first)} are new")
assert len(first) == 3 and all_came == first, "torch's threads are kept in another way now"
assert len(two_came) == 1 and two_came < first, "a smaller team ends no thread any more"
assert len(again) == 3 and len(again - first) == 2, "torch makes no new threads any more"
print("As described: a smaller team ended two threads, and torch made two new ones.")
PYTHON
