"""Stands for the command ``vllm``: says what vLLM's log says, answers /health, and ends when told.

FAKE: what to do ("", "fail" in a cold start of ours, "fail eager", "hang").  FAKE_LOG: a file that gets a line a start.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


def main() -> None:
    arguments, root = sys.argv[1:], Path(os.environ["VLLM_CACHE_ROOT"])
    eager, ours = "--enforce-eager" in arguments, os.environ["VLLM_COMPILE_EXT"] == "1"
    cold = not (root / "compiled").exists()
    child = subprocess.Popen(["sleep", "1000"])
    told = {"arguments": arguments, "eager": eager, "ours": ours, "cold": cold, "child": child.pid}
    told |= {"home": os.environ["HOME"], "root": str(root), "hf": os.environ["HF_HOME"]}
    with Path(os.environ["FAKE_LOG"]).open("a") as file:
        file.write(json.dumps(told) + "\n")
    print("INFO Initializing a V1 LLM engine", flush=True)
    what = os.environ.get("FAKE", "")
    if what == "hang":
        time.sleep(1000)
    if (what == "fail" and ours and cold and not eager) or (what == "fail eager" and eager):
        print("(EngineCore pid=1) ERROR no such kernel\n(EngineCore pid=1) ERROR really", flush=True)
        sys.exit(1)
    print("INFO Starting to load model\nINFO Warming up model for the compilation", flush=True)
    if not eager:
        (root / "compiled").touch()
        took = {(True, True): 1.5, (True, False): 10.25, (False, True): 0.01, (False, False): 9.0}[cold, ours]
        print(f"INFO torch.compile took {took} s in total", flush=True)
    print("INFO init engine (profile, create kv cache, warmup model) took 12.50 s", flush=True)
    HTTPServer(("127.0.0.1", int(arguments[arguments.index("--port") + 1])), Handler).serve_forever()


if __name__ == "__main__":
    main()
