"""The README's code, run as it stands, block after block in one namespace."""

import pathlib
import re

README = pathlib.Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)


def test_every_python_block_of_the_readme_runs():
    assert len(BLOCKS) >= 5
    namespace = {}
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"README.md, python block {number}", "exec"), namespace)
