"""The compiled extension; everything else of the build is in pyproject.toml."""

import sys

from setuptools import Extension, setup

# The loops are written so that their results are the same on every machine: the compiler may turn
# them into vectors, but it must round each operation by itself.
if sys.platform == "win32":
    FLAGS, LIBRARIES = ["/O2", "/fp:precise", "/std:c11"], []
else:
    FLAGS = ["-std=c11", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
    FLAGS, LIBRARIES = [*FLAGS, "-pthread"], ["m"]

NATIVE = Extension(
    "funcopt._native",
    sources=["funcopt/_native.c"],
    depends=[
        f"funcopt/_native_{part}.h"
        for part in (
            *("adam", "cautious", "hold_back", "job", "launch", "machine", "numbers"),
            *("products", "round", "run", "shorts", "steps"),
            *("tiles", "tiles_bfloat16", "tiles_float32"),
        )
    ],
    extra_compile_args=FLAGS,
    extra_link_args=FLAGS if sys.platform != "win32" else [],
    libraries=LIBRARIES,
    py_limited_api=True,
    optional=True,  # where there is no compiler, the kernels in Python serve
)

setup(ext_modules=[NATIVE], options={"bdist_wheel": {"py_limited_api": "cp311"}})
