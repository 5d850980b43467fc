#!/usr/bin/env python3
"""Run the tests: python3 tests/run.py [pytest arguments]

pytest is installed once, into .venv-test/<version of this Python>; whatever follows the command is handed to pytest.
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
    """The interpreter of a virtual environment that has pytest, made first where there is none."""
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
    """Install what is missing, run pytest from the project's root and return its exit code."""
    if sys.version_info < (3, 11):
        sys.exit("tests/run.py needs Python 3.11 or newer, this is " + platform.python_version())
    try:
        python = venv_python()
    except subprocess.CalledProcessError as failed:
        return failed.returncode or 1
    return subprocess.call([str(python), "-m", "pytest", *sys.argv[1:]], cwd=ROOT)


if __name__ == "__main__":
    sys.exit(main())
