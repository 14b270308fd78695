"""The tests of `funcopt.torchscript`."""
