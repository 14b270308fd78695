"""The tests mirror the package: the tests of a room lie in a folder of its name."""
