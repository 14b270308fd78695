"""Optimizers around optimizers, one file each. What they share is in files with an underscore.

How to write one is said in `funcopt.extend`; `clip_value.py` is the shortest one with a number of
its own. For a new one, besides its file here and its tests in `tests/wrappers/`:

- `funcopt/__init__.py` exports it and its state;
- `docs/guides/wrappers.md` has it in its table, `docs/api/wrappers.md` has it with its state,
  CHANGELOG says that it is new;
- `tests/every_optimizer.py` has one of it, on which what is true of every optimizer is tested;
- `tests/cases.py`, `tests/core/test_node.py`, `tests/core/test_find_replace.py` and
  `tests/optimizers/test_laws.py` have it among wrapped optimizers;
- `tests/test_structure.py` has its module in `FLOORS`, above what it imports.
"""
