"""How fast funcopt is and how much memory it takes: `python -m tests.benchmarks`.

Every figure is a ratio: candidates take turns in one process, and each is compared with what the
baseline took in the same round, so that whatever slows the machine down for a while slows both. The
table names each target beside what was measured and says whether it holds. `--help` tells the rest.

TorchOpt and optax are measured where they are installed, and said to be missing where they are not.
The largest workload has all candidates in memory at once, which takes 10 GB.
"""
