#!/usr/bin/env python3
"""Run the tests: python3 tests/run.py [pytest arguments]

The first run installs pytest into .venv-test/<version of this Python>. It needs the venv module and a package index.
All tests take one to two minutes. Arguments are passed to pytest, for example: -q tests/test_readme.py
"""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTEST = "pytest>=9.0,<10"


def venv_python() -> Path:
    """Return the Python of a virtual environment with pytest; create it if it is missing or out of date."""
    venv = ROOT / ".venv-test" / platform.python_version()
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed = venv / "installed"
    if python.exists() and installed.exists() and installed.read_text() == PYTEST:
        return python
    if importlib.util.find_spec("ensurepip") is None:
        sys.exit("tests/run.py: this Python has no ensurepip (on Debian and Ubuntu: apt install python3-venv)")
    shutil.rmtree(venv, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, PYTEST], check=True)
    installed.write_text(PYTEST)
    return python


def main() -> int:
    """Install pytest if needed, run it in the project's folder and return its exit code."""
    try:
        python = venv_python()
    except subprocess.CalledProcessError as error:  # venv or pip, which have printed the reason
        return error.returncode or 1
    return subprocess.call([str(python), "-m", "pytest", *sys.argv[1:]], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
