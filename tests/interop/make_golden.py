"""Write the golden files: `python -m tests.interop.make_golden`.

They are what the present version of the format looks like on disk. A new version adds files; these
are not written again, so that what was saved once can always be read.
"""

import pathlib

import torch
from safetensors.torch import save_file

from funcopt.interop import to_state_dict

from .runs import after_one_step
from .test_checkpoint import GOLDEN_STATE

GOLDEN = pathlib.Path(__file__).parent / "golden"

if __name__ == "__main__":
    torch.save(to_state_dict(GOLDEN_STATE), GOLDEN / "state-1.pt")
    save_file(to_state_dict(GOLDEN_STATE), GOLDEN / "state-1.safetensors")
    torch.save(after_one_step(amsgrad=True).state_dict(), GOLDEN / "torch-2.13.pt")
