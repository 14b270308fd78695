"""Tests of `funcopt.schedules`."""
