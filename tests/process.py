"""Run Python in a fresh process: what the plugin does to a process can only be seen from its beginning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import textwrap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
BASE = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
}
# A machine without FlashInfer has to say so, also to the processes of tests.
KEPT = ("VLLM_USE_FLASHINFER_SAMPLER",)


@dataclass(frozen=True)
class Outcome:
    """What a process left: exit status, everything it printed, and the value it reported (see `run`)."""

    code: int
    output: str
    value: Any

    def lines(self, *words: str) -> list[str]:
        """The printed lines that contain all of `words`."""
        return [line for line in self.output.splitlines() if all(word in line for word in words)]


def environment(**env: str | None) -> dict[str, str]:
    """This process's environment without any VLLM_* variable, with `BASE` and `env`; None unsets."""
    merged = {k: v for k, v in os.environ.items() if not k.startswith("VLLM_") or k in KEPT} | BASE | env
    return {k: v for k, v in merged.items() if v is not None}


def start(code: str, folder: Path, *args: str, **env: str | None) -> subprocess.Popen[bytes]:
    """Start `code` in `folder`; it calls ``report(value)`` with something that JSON can hold."""
    prelude = "import json, sys\ndef report(value):\n    json.dump(value, open('report.json', 'w'))\n"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.json").unlink(missing_ok=True)
    (folder / "main.py").write_text(prelude + textwrap.dedent(code))
    with (folder / "output.txt").open("w") as output:
        return subprocess.Popen(
            [sys.executable, "main.py", *args],
            cwd=folder,
            env=environment(**env),
            stdout=output,
            stderr=subprocess.STDOUT,
        )


def finish(process: subprocess.Popen[bytes], folder: Path, timeout: float = 870) -> Outcome:
    """Wait for a process of `start`, at most `timeout` seconds."""
    code = process.wait(timeout)
    report = folder / "report.json"
    value = json.loads(report.read_text()) if report.exists() else None
    return Outcome(code, (folder / "output.txt").read_text(), value)


def run(code: str, *args: str, folder: Path | None = None, **env: str | None) -> Outcome:
    """`start` and `finish`, in a temporary folder unless `folder` is given."""
    if folder is not None:
        return finish(start(code, folder, *args, **env), folder)
    with tempfile.TemporaryDirectory() as name:
        return finish(start(code, Path(name), *args, **env), Path(name))
