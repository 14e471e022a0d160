"""The figures in README.md and docs/ are those of benchmarks/results/."""

import subprocess
import sys

from tools.layout import REPOSITORY


def table(*options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "benchmarks/table.py", *options], cwd=REPOSITORY, capture_output=True, text=True, check=False)


def test_the_files_show_the_results():
    checked = table("--check")
    assert checked.returncode == 0, checked.stderr


def test_every_table_is_printed():
    printed = table().stdout
    assert "tokens/s" in printed and "| fault of a run |" in printed
