"""The README's figures are those of benchmarks/results/."""

import subprocess
import sys

from tools.layout import REPOSITORY


def test_the_readme_shows_the_results():
    table = subprocess.check_output([sys.executable, "benchmarks/table.py"], cwd=REPOSITORY, text=True).strip()
    assert table in (REPOSITORY / "README.md").read_text(), "Run `python benchmarks/table.py --write`."
    assert "tokens/s" in table
