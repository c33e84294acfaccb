"""`vllm serve` with engine and worker forked, or forked itself from the standby, is as with all of them spawned, and
leaves nothing behind when it is ended.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.serve import Server, standing_by
from tests.conftest import FULL

pytestmark = pytest.mark.engine

ARGS = ("--dtype", "float32", "--max-num-batched-tokens", "256", "--max-model-len", "256")
MARK = "MARK_OF_THIS_TEST"
KILLED = "force killing"  # vLLM kills an engine that takes too long to end, whose shared memory then stays
KINDS = {"VLLM::EngineCore": "engine", "VLLM::Worker": "worker"}


def processes(mark: Path) -> dict[int, Path]:
    """The processes that have `mark` in their environment, and have not ended, by number."""
    found = {}
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and f"{MARK}={mark}\0".encode() in (folder / "environ").read_bytes():
                found[int(folder.name)] = folder
        except OSError:
            continue
    return found


def wait_for_end(mark: Path) -> None:
    """Two minutes at most: on a busy machine vLLM takes its time."""
    deadline = time.monotonic() + 120
    while of_servers(mark) and time.monotonic() < deadline:
        time.sleep(0.2)


def shared_memory(mark: Path) -> set[Path]:
    """What they have mapped of it."""
    found = set[str]()
    for folder in processes(mark).values():
        try:
            found |= {*re.findall(r" (/dev/shm/\S+)$", (folder / "maps").read_text(), re.MULTILINE)}
        except OSError:
            continue
    return {Path(name) for name in found}


def about(folder: Path) -> dict[str, Any]:
    """What a process inherits, and where its threads may run."""
    status = dict(line.split(":\t", 1) for line in (folder / "status").read_text().splitlines())
    tasks = [(task / "status").read_text() for task in (folder / "task").iterdir()]
    return {
        "parent": int(status["PPid"]),
        "limits": (folder / "limits").read_text(),
        "signals": [status[name] for name in ("SigBlk", "SigIgn", "ShdPnd")],
        "mask": status["Umask"],
        "processors": sorted({re.findall(r"Cpus_allowed_list:\s*(\S+)", task)[0] for task in tasks}),
        "folder": str((folder / "cwd").readlink()),
        "input": str((folder / "fd/0").readlink()),
        "open": sorted(str(file.name) for file in (folder / "fd").iterdir() if int(file.name) < 3),
    }


@contextlib.contextmanager
def standby(cache: Path, folder: Path) -> Iterator[tuple[Path, dict[str, str]]]:
    """The mark of a standby, which its forks have too, and the environment that makes a start one of them."""
    mark = folder / "standby"
    with standing_by(cache, {"VLLM_CPU_OMP_THREADS_BIND": "0-1", MARK: str(mark)}, folder / "standby.log") as env:
        yield mark, dict(env)


def of_servers(mark: Path) -> dict[int, Path]:
    """`processes` without the standby."""
    found = {}
    for number, path in processes(mark).items():
        with contextlib.suppress(OSError):  # it has just ended
            if "Standby" not in (path / "cmdline").read_text():
                found[number] = path
    return found


def serve(model: Path, folder: Path, name: str, mark: Path | None = None, **env: str) -> dict[str, Any]:
    """A server that is asked 16 things at once."""
    log, mark = folder / f"{name}.log", mark or folder
    env |= {MARK: str(mark), "VLLM_CPU_OMP_THREADS_BIND": "0-1"}
    prompts = [f"{n} things that a list {'may ' * n}hold" for n in range(16)]
    with Server(model, log, folder / "cache", env=env, args=ARGS) as server, ThreadPoolExecutor(16) as pool:
        server.wait_ready()
        common = {"temperature": 0, "max_tokens": 16, "ignore_eos": True, "logprobs": 1}
        asked = [pool.submit(server.post, "/v1/completions", common | {"prompt": prompt}) for prompt in prompts]
        answers = [each.result()["choices"][0] for each in asked]
        found = {}
        served = re.findall(r"is served by (\d+)", log.read_text())
        for number, path in of_servers(mark).items():
            title = (path / "cmdline").read_text().split("\0")[0].strip()
            kind = KINDS.get(title, "zygote" if title == "VLLM::Zygote" else "front" if "python" in title else title)
            if served and kind == "front" and str(number) not in served:
                kind = "client"
            if "resource_tracker" not in (path / "cmdline").read_text():
                found[kind] = (number, about(path))
        memory = shared_memory(mark)
    wait_for_end(mark)
    return {
        "text": [(each["text"], each["logprobs"]["tokens"]) for each in answers],
        "logprobs": [each["logprobs"]["token_logprobs"] for each in answers],
        "found": found,
        "left": [(path / "cmdline").read_text() for path in of_servers(mark).values()],
        "shared": [path for path in memory if path.exists()],
        "memory": len(memory),
        "log": log.read_text(),
    }


@pytest.fixture(scope="module")
def ran(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("fork")
    found = {
        "cache": folder / "cache",
        "spawned": serve(llama2, folder, "spawned", VLLM_COMPILE_FORK="0"),
        "forked": serve(llama2, folder, "forked"),
    }
    with standby(folder / "cache", folder) as (mark, env):
        found["standby"] = serve(llama2, folder, "from the standby", mark, **env)
        found["standby again"] = serve(llama2, folder, "again", mark, **env)
    return found


FORKED = ("forked", "standby", "standby again")


def test_it_is_forked(ran: dict[str, Any]) -> None:
    assert "zygote" not in ran["spawned"]["found"]
    for how in FORKED:
        assert "zygote" in ran[how]["found"]
        assert "is spawned" not in ran[how]["log"]
        assert ("is served by" in ran[how]["log"]) == (how != "forked")


@pytest.mark.parametrize("how", FORKED)
def test_16_requests_at_once_get_the_answers_of_a_spawned_server(ran: dict[str, Any], how: str) -> None:
    assert len({text for text, _ in ran["spawned"]["text"]}) > 8
    assert ran[how]["text"] == ran["spawned"]["text"]
    for forked, spawned in zip(ran[how]["logprobs"], ran["spawned"]["logprobs"], strict=True):
        assert forked == pytest.approx(spawned, abs=1e-4)


@pytest.mark.parametrize("how", FORKED)
def test_what_a_spawned_worker_compiled_is_loaded(ran: dict[str, Any], how: str) -> None:
    assert "kept as" in ran["spawned"]["log"]
    assert "loaded compiled code" in ran[how]["log"]
    assert "cache miss" not in ran[how]["log"]


@pytest.mark.parametrize("how", FORKED)
@pytest.mark.parametrize("kind", ["engine", "worker"])
def test_a_process_is_as_a_spawned_one(ran: dict[str, Any], kind: str, how: str) -> None:
    seen = []
    for each in ("spawned", how):
        found = ran[each]["found"]
        _, what = found[kind]
        above, _ = found["front" if kind == "engine" else "engine"]
        assert what["parent"] == above
        seen.append({name: value for name, value in what.items() if name != "parent"})
    assert seen[0] == seen[1]


@pytest.mark.parametrize("how", ["spawned", *FORKED])
def test_nothing_is_left(ran: dict[str, Any], how: str) -> None:
    assert ran[how]["left"] == []
    assert ran[how]["memory"] > 0
    assert KILLED in ran[how]["log"] or ran[how]["shared"] == []


def test_starts_that_are_ended_at_random_leave_nothing(llama2: Path, ran: dict[str, Any], tmp_path: Path) -> None:
    """30 in full, else 2: while the front end imports, or once it is ready.  (In between stock vLLM 0.32's front end
    waits for ever for an engine that has ended.)
    """
    r = random.Random(0)
    signals = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # as in a background job, whose programs ignore it too
        signals.append(signal.SIGINT)
    for number in range(30 if FULL else 2):
        env = {MARK: str(tmp_path)}
        log, cache = tmp_path / f"{number}.log", ran["cache"]
        with Server(llama2, log, cache, env=env, args=ARGS) as server:
            if number % 2:
                server.wait_ready()
                time.sleep(r.uniform(0, 1))
            else:
                time.sleep(r.uniform(0.1, 4))
            memory = shared_memory(tmp_path)
            main = min(processes(tmp_path))
            (os.kill if r.random() < 0.7 else os.killpg)(main, r.choice(signals))
            wait_for_end(tmp_path)
            left = [(path / "cmdline").read_text() for path in processes(tmp_path).values()]
        assert left == [], log.read_text()[-3000:]
        assert KILLED in log.read_text() or [path for path in memory if path.exists()] == []


def test_starts_from_the_standby_that_are_killed_leave_no_process(
    llama2: Path, ran: dict[str, Any], tmp_path: Path
) -> None:
    """30 in full, else 2, at any moment; of stock's, engine and worker go on where the front end is killed."""
    r = random.Random(1)
    with standby(ran["cache"], tmp_path) as (mark, env):
        for number in range(30 if FULL else 2):
            log = tmp_path / f"{number}.log"
            with Server(llama2, log, ran["cache"], env=env, args=ARGS) as server:
                time.sleep(r.uniform(0.1, 8))
                os.kill(server.pid, signal.SIGKILL)
                wait_for_end(mark)
                assert of_servers(mark) == {}, log.read_text()[-3000:]
