"""A process that has vLLM imported and runs programs in forks of itself.

With the argument "plugin" it has loaded the plugin and what an engine needs; else it is as far as vLLM's front end is
when that loads plugins.  `tests/process.py` starts it.  A line on its standard input asks for a program to be started,
or to be waited for.
"""

from __future__ import annotations

import atexit
import json
import os
import runpy
import sys
from pathlib import Path


def run(folder: str, args: list[str], env: dict[str, str]) -> None:
    os.chdir(folder)
    for number, name in enumerate((os.devnull, "output.txt", "output.txt")):
        os.dup2(os.open(name, os.O_RDWR | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["main.py", *args]
    sys.path.insert(0, folder)
    runpy.run_path(str(Path("main.py").resolve()), run_name="__main__")  # what it spawns looks for the file


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # for what libraries print
    if "plugin" in sys.argv:
        from tests import forks
        from vllm_compile_ext import plugin

        plugin.register()
        forks.prepare()
    else:
        import vllm.engine.arg_utils  # noqa: F401
    for line in sys.stdin:
        request = json.loads(line)
        if isinstance(request, int):
            answer = os.waitstatus_to_exitcode(os.waitpid(request, 0)[1])
        elif not (answer := os.fork()):
            run(**request)
            # The rest of Python's end would take more than a second.
            atexit._run_exitfuncs()
            sys.stdout.flush()
            os._exit(0)
        print(answer, file=answers, flush=True)


if __name__ == "__main__":
    main()
