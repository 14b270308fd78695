"""What must not be imported here."""

# It registers the class, and torch's tests set up much of a process for themselves.
collect_ignore = ["torch_suite.py"]
