"""torch's own test of its RPC optimizer passes with the class in torch's table."""

import os
import pathlib
import re
import signal
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2]
LONGEST = 200


def test_the_suite_of_torch_passes():
    # Where CI is set, torch's runner asks for a package that writes reports.
    environment = {name: value for name, value in os.environ.items() if name != "CI"}
    environment["TP_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    suite = subprocess.Popen(
        [sys.executable, "-m", "tests.torchscript.torch_suite"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,  # so that what it starts can be stopped with it
    )
    try:
        output, _ = suite.communicate(timeout=LONGEST)
    finally:
        if suite.poll() is None:
            os.killpg(suite.pid, signal.SIGKILL)
            suite.wait()
    assert suite.returncode == 0, output
    # Torch's four, of which `test_dist_optim` tries AdamW, and ours, all run and none skipped.
    assert re.search(r"^Ran 5 tests in .*\n\nOK$", output, re.MULTILINE), output
    # In each of two processes once in torch's test, and in ours twice with each of four options.
    assert output.count("The optimizer was FunctionalAdamW.") == 2 * (1 + 2 * 4), output
