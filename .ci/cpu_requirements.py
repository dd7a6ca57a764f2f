"""Prints what pyproject.toml asks for, with onnxruntime in the place of onnxruntime-gpu: what `CPU=1` installs.

Usage: python .ci/cpu_requirements.py EXTRA[,EXTRA...]
"""

import re
import sys
import tomllib
from pathlib import Path


def cpu_requirements(project: dict[str, object], extras: list[str]) -> list[str]:
    """The requirements of the project and of `extras`, one onnxruntime among them, on every platform."""
    optional = project["optional-dependencies"]
    requirements = [*project["dependencies"], *(line for extra in extras for line in optional[extra])]
    chosen = [re.sub(r"^onnxruntime-gpu\b", "onnxruntime", line) for line in requirements]
    return sorted({re.sub(r";.*", "", line).strip() if line.startswith("onnxruntime") else line for line in chosen})


if __name__ == "__main__":
    table = tomllib.loads(Path("pyproject.toml").read_text())
    sys.stdout.write("\n".join(cpu_requirements(table["project"], sys.argv[1].split(","))) + "\n")
