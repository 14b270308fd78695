"""The tests mirror the package: what `funcopt/x.py` promises is tested in `tests/test_x.py`."""
