"""A start from the standby is as an ordinary one, and what cannot be is one."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.process import ROOT, environment
from vllm_compile_ext.standby import client

STARTED = "standing by"
SERVED = "is served by"
# Variables that imports of vLLM set themselves.
SET_BY_IMPORTS = (
    *("AITER_SITUV2_A4W4", "LD_LIBRARY_PATH", "PYTORCH_NVML_BASED_CUDA_CHECK", "TILELANG_CLEANUP_TEMP_FILES"),
    *("TORCHINDUCTOR_CACHE_DIR", "TORCHINDUCTOR_COMPILE_THREADS", "TRITON_CACHE_AUTOTUNING"),
)
# A program called `vllm`, which imports vLLM and then runs what it is told to.
PROGRAM = """\
import sys
import vllm
if __name__ == "__main__":
    exec(sys.argv[2])
"""
# What others bring into each Python process: a module that may change; and, so that tests are quick, an empty vLLM for
# all but the standby.
SITE = """\
import sys
from importlib.machinery import ModuleSpec
import held_by_a_test

class Quick:
    def find_spec(self, name, path=None, target=None):
        if name == "vllm" and "standby" not in str(sys.orig_argv) and "-m" not in sys.orig_argv:
            return ModuleSpec("vllm", None, is_package=True)

sys.meta_path.insert(1, Quick())  # behind the plugin's
"""
LOOK = """
import json, logging, os, random, resource, signal, sys, threading, multiprocessing.process
status = dict(line.split(":\\t", 1) for line in open("/proc/self/status").read().splitlines())
main = sys.modules["__main__"]
numbers = [number for number in signal.valid_signals() if number not in (9, 19)]
print(json.dumps({
    "environ": dict(os.environ),
    "argv": (sys.argv, sys.orig_argv, sys.path, sys.executable, sys.flags),
    "main": (main.__name__, main.__file__, main.__spec__, "PROGRAM" in vars(main)),
    "folder": (os.getcwd(), multiprocessing.process.ORIGINAL_DIR, status["Umask"]),
    "limits": [resource.getrlimit(number) for number in range(16)],
    "signals": {name: status[name] for name in ("SigBlk", "SigIgn", "Cpus_allowed_list", "Uid", "Gid")},
    "handlers": {number: str(signal.getsignal(number)).split(" at ")[0] for number in numbers},
    "name": (multiprocessing.process.current_process().name, [each.name for each in threading.enumerate()]),
    "streams": [os.readlink(f"/proc/self/fd/{number}") for number in (0, 1, 2)],
    "given": [os.pread(number, 9, 0).decode() for number in (7, 8)] if "GIVEN" in os.environ else None,
    "inherited": [os.get_inheritable(number) for number in (7, 8)] if "GIVEN" in os.environ else None,
    "stdin": sys.stdin.read(),
    "children": len(multiprocessing.active_children()),
}))
"""


def usual() -> None:
    """A background job begins with some signals ignored."""
    for number in (signal.SIGINT, signal.SIGQUIT):
        signal.signal(number, signal.SIG_DFL)


@dataclass
class Place:
    """A folder with the program, the socket's folder, and the environment of both sides."""

    folder: Path
    env: dict[str, str] = field(default_factory=dict)
    standby: Any = None

    def __post_init__(self) -> None:
        self.bin, self.extra = self.folder / "bin", self.folder / "extra"
        self.bin.mkdir()
        self.extra.mkdir()
        (self.bin / "vllm").write_text(PROGRAM)
        (self.extra / "sitecustomize.py").write_text(SITE)
        (self.extra / "held_by_a_test.py").write_text("WHAT = 1\n")
        self.env = environment(
            VLLM_COMPILE_STANDBY=str(self.folder / "at"),
            VLLM_CACHE_ROOT=str(self.folder / "cache"),
            PYTHONPATH=os.pathsep.join([str(self.extra), str(ROOT)]),
            VLLM_ENABLE_V1_MULTIPROCESSING=None,
            VLLM_NO_USAGE_STATS=None,
        )

    @property
    def log(self) -> str:
        return (self.folder / "standby.log").read_text()

    def stand_by(self, *options: str, times: int = 1) -> subprocess.Popen[bytes]:
        """Start a standby; returns when it stands by."""
        command = [sys.executable, "-m", "vllm_compile_ext.cli", "standby", *options]
        with (self.folder / "standby.log").open("ab") as log:
            process = subprocess.Popen(
                command, env=self.env, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self.standby = process
        self.wait_until(lambda: self.log.count(STARTED) >= times or process.poll() is not None)
        return process

    def wait_until(self, is_so: Callable[[], object], seconds: float = 120) -> None:
        deadline = time.monotonic() + seconds
        while not is_so():
            assert time.monotonic() < deadline, self.log
            time.sleep(0.02)

    def command(self, code: str) -> list[str]:
        return [sys.executable, str(self.bin / "vllm"), "serve", code]

    def run(self, code: str, command: Sequence[str] = (), **options: Any) -> subprocess.CompletedProcess[str]:
        options = {"env": self.env, "cwd": self.folder, "input": "", "timeout": 60, "preexec_fn": usual} | options
        return subprocess.run([*command, *self.command(code)], capture_output=True, text=True, **options)

    def start(self, code: str, **options: Any) -> subprocess.Popen[str]:
        """Start a program that prints a line when it runs; wait for it."""
        options = {"env": self.env, "cwd": self.folder, "stdin": subprocess.DEVNULL, "preexec_fn": usual} | options
        piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        program: subprocess.Popen[str] = subprocess.Popen(self.command(code), **(piped | options))
        return program


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder with a short name: the path of a socket has 107 bytes."""
    folder = Path(tempfile.mkdtemp(prefix="vs-"))
    yield folder
    shutil.rmtree(folder)


def end(process: subprocess.Popen[Any]) -> None:
    process.terminate()
    process.wait(30)


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    """Where a standby stands by for all tests of this file that leave it as it is."""
    folder = Path(tempfile.mkdtemp(prefix="vs-"))
    found = Place(folder)
    process = found.stand_by()
    assert STARTED in found.log, found.log
    yield found
    assert process.poll() is None
    assert found.log.count(STARTED) == 1, found.log
    end(process)
    shutil.rmtree(folder)


def is_served(done: subprocess.CompletedProcess[str]) -> bool:
    return SERVED in done.stderr


def off(place: Place) -> dict[str, str]:
    return place.env | {"VLLM_COMPILE_STANDBY": str(place.folder / "nobody")}


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    found = {}
    for name in one | other:
        left, right = one.get(name), other.get(name)
        if isinstance(left, dict) and isinstance(right, dict):
            found |= differences(left, right)
        elif left != right:
            found[name] = (left, right)
    return found


@pytest.mark.parametrize("how", ["plain", "everything else"])
def test_it_is_as_an_ordinary_start(place: Place, tmp_path: Path, how: str) -> None:
    seen = []
    for env in (off(place), place.env):
        options: dict[str, Any] = {"env": env}
        if how != "plain":
            (tmp_path / "7").write_text("seven")
            (tmp_path / "8").write_text("eight")

            def prepare() -> None:
                os.umask(0o027)
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
                for number in (7, 8):
                    os.dup2(os.open(tmp_path / str(number), os.O_RDONLY), number)

            more = {"GIVEN": "1", "HF_TOKEN": "secret", "UNKNOWN": "é", "VLLM_API_KEY": "k"}
            options = {
                "env": env | more,
                "cwd": tmp_path,
                "input": "what it reads",
                "preexec_fn": prepare,
                "pass_fds": (7, 8),
            }
        done = place.run(LOOK, **options)
        assert is_served(done) == (env is place.env), done.stderr
        found = json.loads(done.stdout)
        for name in ("VLLM_COMPILE_STANDBY", *SET_BY_IMPORTS):
            found["environ"].pop(name, None)
        found["streams"] = [re.sub(r"\d+", "", stream) for stream in found["streams"]]
        seen.append(found)
    assert differences(*seen) == {}
    assert seen[1]["stdin"] == ("" if how == "plain" else "what it reads")
    assert how == "plain" or seen[1]["given"] == ["seven", "eight"]


def test_what_imports_keep_of_the_working_folder_is_the_clients(place: Place, tmp_path: Path) -> None:
    code = """
import sys
from torch._dynamo import config
from torch._inductor import config as inductor
print(config.debug_dir_root, inductor.xpu.cutlass_dir)
print(sys.modules["transformers.utils.auto_docstring"].PATH_TO_TRANSFORMERS)
"""
    done = place.run(code, cwd=tmp_path)
    assert is_served(done), done.stderr
    assert done.stdout.split() == [f"{tmp_path}/torch_compile_debug", f"{tmp_path}", f"{tmp_path}/src/transformers"]


def test_nothing_of_a_client_stays_in_the_standby(place: Place) -> None:
    secret = "what nobody may see"
    done = place.run("import os; print(os.environ['HF_TOKEN'])", env=place.env | {"HF_TOKEN": secret})
    assert is_served(done)
    assert done.stdout == f"{secret}\n"
    assert holds(place.standby.pid, b"standing by")
    assert not holds(place.standby.pid, secret.encode())


def holds(pid: int, what: bytes) -> bool:
    """Whether the memory that a process can write to has it anywhere."""
    with Path(f"/proc/{pid}/mem").open("rb", 0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            first, last, how = re.match(r"(\w+)-(\w+) (\S+)", line).groups()  # type: ignore[union-attr]
            if how.startswith("rw"):
                memory.seek(int(first, 16))
                if what in memory.read(int(last, 16) - int(first, 16)):
                    return True
    return False


def test_each_start_has_secrets_of_its_own(place: Place) -> None:
    code = "import multiprocessing, random; print(bytes(multiprocessing.current_process().authkey), random.random())"
    one, other = place.run(code), place.run(code)
    assert one.stdout
    assert {*one.stdout.split()} & {*other.stdout.split()} == set()


@pytest.mark.parametrize(
    ("code", "status"),
    [
        ("sys.exit(0)", 0),
        ("sys.exit(3)", 3),
        ("sys.exit('why it ends')", 1),
        ("raise RuntimeError('why it ends')", 1),
        ("import os; os._exit(300 & 255)", 44),
        ("import os; os.kill(os.getpid(), 15)", -15),
        ("import os; os.kill(os.getpid(), 9)", -9),
        ("import os; os.abort()", -6),
        ("import os, signal; signal.raise_signal(signal.SIGINT)", -2),
        ("import atexit; atexit.register(print, 'at exit'); sys.exit(4)", 4),
        ("import threading; threading.Timer(0.1, print, ('from a thread',)).start(); sys.exit(5)", 5),
    ],
)
def test_it_ends_as_the_server_does(place: Place, code: str, status: int) -> None:
    stock, ours = (place.run(code, env=env) for env in (off(place), place.env))
    assert is_served(ours)
    assert (stock.returncode, ours.returncode) == (status, status)
    assert ours.stdout == stock.stdout
    told = [line for line in ours.stderr.splitlines() if SERVED not in line and "File" not in line and "^" not in line]
    assert [line for line in stock.stderr.splitlines() if line in told] == [
        line for line in stock.stderr.splitlines() if "File" not in line and "^" not in line
    ]


TELL = """
import os, signal, time
def tell(number, frame):
    print(f"got {number}\\n", end="", flush=True)
for number in (1, 2, 10, 12, 15, 28):
    signal.signal(number, tell)
child = os.fork()
print(f"{'child' if child == 0 else 'server'} {os.getpid()}\\n", end="", flush=True)  # at once
for _ in range(600):
    time.sleep(0.05)
"""


def gone(pid: int) -> bool:
    try:
        return "State:\tZ" in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return True


def test_a_signal_reaches_the_server_alone(place: Place) -> None:
    program = place.start(TELL)
    assert program.stdout is not None
    pids = dict(program.stdout.readline().split() for _ in range(2))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGWINCH):
        program.send_signal(number)
        assert program.stdout.readline() == f"got {number.value}\n"
    program.send_signal(signal.SIGHUP)  # of a terminal that is closed; engines would not notice that the server ends
    assert {program.stdout.readline() for _ in range(2)} == {"got 1\n"}
    os.kill(int(pids["child"]), signal.SIGKILL)
    program.send_signal(signal.SIGQUIT)
    assert program.wait(30) == -signal.SIGQUIT
    assert gone(int(pids["server"]))


def test_a_signal_that_a_background_job_ignores_reaches_a_server_that_does_not(place: Place) -> None:
    program = place.start(TELL, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_IGN))
    assert program.stdout is not None
    assert {program.stdout.readline().split()[0] for _ in range(2)} == {"child", "server"}
    program.send_signal(signal.SIGINT)
    assert program.stdout.readline() == "got 2\n"
    program.kill()


def test_children_of_a_server_that_is_killed_end_too(place: Place) -> None:
    program = place.start(TELL)
    assert program.stdout is not None
    pids = dict(program.stdout.readline().split() for _ in range(2))
    os.kill(int(pids["server"]), signal.SIGKILL)
    assert program.wait(30) == -signal.SIGKILL
    place.wait_until(lambda: all(gone(int(pid)) for pid in pids.values()))


def test_a_client_that_says_nothing_harms_nobody(place: Place) -> None:
    (at,) = (place.folder / "at").glob("*.sock")
    for said in (b"", b"f", b"x" * 1000):
        with socket.socket(socket.AF_UNIX) as there:
            there.connect(str(at))
            there.sendall(said)
    assert is_served(place.run("pass"))
    assert is_served(place.run("pass", env=place.env | {f"MANY_{n}": "x" * 1000 for n in range(900)}))


def test_a_client_that_is_killed_takes_the_server_along(place: Place) -> None:
    program = place.start(TELL)
    assert program.stdout is not None
    pids = dict(program.stdout.readline().split() for _ in range(2))
    program.kill()
    place.wait_until(lambda: all(gone(int(pid)) for pid in pids.values()))


def test_a_keeper_that_is_killed_ends_both(place: Place) -> None:
    program = place.start(TELL)
    assert program.stdout is not None
    assert program.stderr is not None
    pids = dict(program.stdout.readline().split() for _ in range(2))
    keeper = int(re.findall(r"PPid:\t(\d+)", Path(f"/proc/{pids['server']}/status").read_text())[0])
    os.kill(keeper, signal.SIGKILL)
    assert program.wait(30) == 1
    assert "killed" in program.stderr.read()
    place.wait_until(lambda: all(gone(int(pid)) for pid in pids.values()))


def test_a_terminal_reaches_all_of_it(short: Path) -> None:
    place = Place(short)
    ours, theirs = pty.openpty()
    # The standby has a terminal too: what imports could have seen of it is the same.
    command = [sys.executable, "-m", "vllm_compile_ext.cli", "standby"]
    standby = subprocess.Popen(
        command, env=place.env, cwd=short, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True
    )
    said = ""
    while STARTED not in said:
        said += os.read(ours, 1000).decode()

    def lead() -> None:
        usual()
        os.setsid()
        import fcntl
        import termios

        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    mine, its = pty.openpty()
    program = subprocess.Popen(
        place.command(TELL), env=place.env, cwd=short, stdin=its, stdout=its, stderr=its, preexec_fn=lead
    )
    text = ""

    def read_until(words: str, times: int = 1) -> None:
        nonlocal text
        while text.count(words) < times:
            text += os.read(mine, 1000).decode()

    read_until("child")
    read_until("server")
    assert SERVED in text
    os.write(mine, b"\x03")  # Ctrl-C
    read_until("got 2", 2)
    os.write(mine, b"\x1a")  # Ctrl-Z
    number = re.findall(r"server (\d+)", text)[0]
    server = Path(f"/proc/{number}/status")
    place.wait_until(lambda: "State:\tT" in server.read_text())
    place.wait_until(lambda: "State:\tT" in Path(f"/proc/{program.pid}/status").read_text())
    program.send_signal(signal.SIGCONT)
    place.wait_until(lambda: "State:\tT" not in server.read_text())
    os.write(mine, b"\x1c")  # Ctrl-\
    assert program.wait(30) == -signal.SIGQUIT
    place.wait_until(lambda: gone(int(server.parent.name)))
    end(standby)


# What may differ, and what the line says of it.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "a variable that is read": ({"env": {"VLLM_LOGGING_LEVEL": "DEBUG"}}, "VLLM_LOGGING_LEVEL is another"),
    "a native one": ({"env": {"OMP_NUM_THREADS": "1"}}, "OMP_NUM_THREADS is another"),
    "two": ({"env": {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "1"}}, "CUDA_VISIBLE_DEVICES, OMP_NUM_THREADS"),
    "preloaded": ({"env": {"LD_PRELOAD": "libm.so.6"}}, "LD_PRELOAD is another"),
    "PYTHONPATH": ({"env": {"PYTHONPATH": str(ROOT)}}, "the search path of modules is another"),
    "an option of Python": ({"env": {"PYTHONWARNINGS": "ignore"}}, "an option of Python is another"),
    "a limit": ({"command": ["prlimit", "--nofile=500"]}, "a resource limit is another"),
    "processors": ({"command": ["taskset", "-c", "0"]}, "the processors that it may use is another"),
    "priority": ({"command": ["nice"]}, "the priority is another"),
    "network": ({"command": ["unshare", "--net"]}, "the namespaces is another"),
    "memory policy": ({"command": ["numactl", "--interleave=all"]}, "the memory policy is another"),
    "a tracer": ({"command": ["strace", "-f", "-o", os.devnull]}, "a debugger, a profiler or a thread is another"),
    "Python's own": ({"env": {"PYTHONHASHSEED": "42"}}, "PYTHONHASHSEED is another"),
    "certificates": ({"env": {"SSL_CERT_FILE": "/nowhere"}}, "SSL_CERT_FILE is another"),
    "by its beginning": ({"env": {"TQDM_DISABLE": "1"}}, "TQDM_DISABLE is another"),
    "group": ({"command": ["setpriv", "--clear-groups", "--rgid", "65534"]}, "the user or group is another"),
    "privileges": ({"command": ["setpriv", "--no-new-privs"]}, "a capability or a filter is another"),
    "a terminal": ({"command": ["script", "-qec"]}, "whether a standard stream is a terminal is another"),
    "too many files": ({"files": 300}, "it did not answer"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_differs_is_an_ordinary_start(place: Place, what: str) -> None:
    how, line = REFUSED[what]
    command, options = [*how.get("command", ())], {"env": place.env | how.get("env", {})}
    if command and shutil.which(command[0]) is None:
        pytest.skip(f"no {command[0]}")
    if command and command[0] in ("unshare", "setpriv") and os.getuid() != 0:
        pytest.skip("needs root")
    code = "print('it ran')"
    if how.get("files"):
        files = [os.open(os.devnull, os.O_RDONLY) for _ in range(how["files"])]
        options["pass_fds"] = files
    if what == "a terminal":
        text = " ".join([sys.executable, str(place.bin / "vllm"), "serve", "\"print('it ran')\""])
        done = subprocess.run(
            [*command, text, "/dev/null"], capture_output=True, text=True, cwd=place.folder, **options
        )
        told = done.stdout
    else:
        done = place.run(code, command, **options)
        told = done.stderr
    for file in options.get("pass_fds", ()):
        os.close(file)
    assert "it ran" in done.stdout, done.stderr
    assert f"the standby is not used: {line}" in told
    assert SERVED not in told


def test_a_module_in_the_way_is_an_ordinary_start(place: Place, tmp_path: Path) -> None:
    """Beside the program, where Python looks first: a module that an import of vLLM would find there."""
    shutil.copy(place.bin / "vllm", tmp_path)
    (tmp_path / "unrelated.py").touch()
    command = [sys.executable, str(tmp_path / "vllm"), "serve", "import sys; print(sys.path[0])"]
    options: dict[str, Any] = {"env": place.env, "cwd": place.folder, "capture_output": True, "text": True}
    done = subprocess.run(command, input="", **options)
    assert is_served(done), done.stderr
    assert done.stdout == f"{tmp_path}\n"
    for name in ("flash_attn", "torchvision.py"):  # one that is looked for in vain, one that is there
        path = tmp_path / name
        path.mkdir() if "." not in name else path.touch()
        done = subprocess.run(command, input="", **options)
        assert f"{path} would be imported" in done.stderr
        assert done.stdout == f"{tmp_path}\n"
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def test_a_program_that_does_something_of_its_own_is_run_once(place: Place, tmp_path: Path) -> None:
    script = tmp_path / "vllm"
    script.write_text('import sys\nprint("once")\nimport vllm\n')
    command = [sys.executable, str(script), "serve"]
    done = subprocess.run(command, env=place.env, cwd=place.folder, input="", capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "once\n")
    assert "does something of its own before it imports vLLM" in done.stderr


@pytest.mark.parametrize(
    "script",
    [
        "#!/bin/python\n# -*- coding: utf-8 -*-\nimport re\nimport sys\nfrom vllm.entrypoints.cli.main import main\n",
        "#!/usr/bin/python\nimport sys\nfrom vllm.entrypoints.cli.main import main\nif __name__ == '__main__':\n",
    ],
)
def test_scripts_of_pip_and_uv_do_nothing_of_their_own(script: str) -> None:
    assert client._SCRIPT.match(script)
    assert not client._SCRIPT.match(script.replace("import sys\n", "import sys\nsys.stdin.read()\n"))


@pytest.mark.parametrize(
    "options",
    [
        ["-m", "vllm.entrypoints.cli.main", "serve", "--port"],
        ["-u", "-m", "vllm.entrypoints.cli.main", "serve", "--port"],
        ["-c", "import importlib.util; importlib.util.find_spec('vllm')"],
        ["-V"],
    ],
)
def test_other_ways_to_start_python(place: Place, options: list[str]) -> None:
    commands = [sys.executable, *options]
    stock, ours = (
        subprocess.run(commands, env=env, cwd=place.folder, input="", capture_output=True, text=True)
        for env in (off(place), place.env)
    )
    assert (ours.returncode, ours.stdout) == (stock.returncode, stock.stdout)
    assert (SERVED in ours.stderr) == (options[0] == "-m")
    assert "RuntimeWarning" not in ours.stderr
    assert ours.stderr.splitlines()[-1:] == stock.stderr.splitlines()[-1:]


def test_help_is_an_ordinary_start(place: Place) -> None:
    """vLLM's options read their own documentation while they are imported, if the command line asks for help."""
    command = [*place.command("print('it ran')"), "--help=port"]
    done = subprocess.run(command, env=place.env, cwd=place.folder, input="", capture_output=True, text=True)
    assert (done.stdout, is_served(done)) == ("it ran\n", False)
    assert "it is asked for help" in done.stderr


def test_a_second_standby_says_that_there_is_one(place: Place) -> None:
    command = [sys.executable, "-m", "vllm_compile_ext.cli", "standby"]
    done = subprocess.run(command, env=place.env, cwd=place.folder, input="", capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith("vllm-compile-ext: cannot stand by: another one stands by at ")


@pytest.mark.parametrize("what", ["open to others", "a link", "too long", "off", "no .pth file"])
def test_a_place_that_is_not_private_is_no_place(short: Path, what: str) -> None:
    place = Place(short)
    at, line = short / "at", "cannot stand by: "
    if what == "open to others":
        at.mkdir()
        at.chmod(0o750)
    elif what == "a link":
        (short / "elsewhere").mkdir(mode=0o700)
        at.symlink_to(short / "elsewhere")
    elif what == "too long":
        place.env["VLLM_COMPILE_STANDBY"] = str(short / ("long" * 30))
    elif what == "off":
        place.env["VLLM_COMPILE_FORK"], line = "0", "VLLM_COMPILE_FORK"
    else:
        (place.extra / "sitecustomize.py").write_text("from vllm_compile_ext import finder; finder.remove()")
        line = "the plugin's .pth file was not read"
    assert place.stand_by().wait(60) == 1
    assert line in place.log


def test_changed_files_are_noticed(short: Path) -> None:
    place = Place(short)
    standby = place.stand_by("--idle", "20")
    code = "import held_by_a_test; print(held_by_a_test.WHAT)"
    assert is_served(place.run(code))
    (place.extra / "held_by_a_test.py").write_text("WHAT = 2\n")
    done = place.run(code)
    assert "held_by_a_test.py has changed" in done.stderr
    assert done.stdout == "2\n"
    place.wait_until(lambda: place.log.count(STARTED) == 2)
    done = place.run(code)
    assert is_served(done)
    assert done.stdout == "2\n"
    (place.extra / "a_new_package").mkdir()
    done = place.run("import a_new_package; print(a_new_package.__path__)")
    assert f"{place.extra} has changed" in done.stderr
    place.wait_until(lambda: place.log.count(STARTED) == 3)
    assert standby.wait(60) == 0  # idle
    assert place.log.endswith("no longer standing by: nobody came for 20 s\n")
    assert not [*(short / "at").glob("*.sock")]
    done = place.run(code)
    assert done.stdout == "2\n"
    assert "standby" not in done.stderr


# What an import does, what the standby says then, and whether it stands by.
WHILE_IMPORTING = {
    "a folder that is removed": (
        "with tempfile.TemporaryDirectory() as made:\n"
        "    note = pathlib.Path(made, 'note'); note.write_text('x'); note.read_text(); os.listdir(made)\n"
        "import rich",
        None,
        True,
    ),
    "a file that the next import finds": (
        "found = pathlib.Path(cache, 'found'); found.exists() or found.write_text('x')",
        "found has changed: begins again",
        True,
    ),
    "a file of every import": (
        "each = pathlib.Path(cache, 'each'); each.exists(); each.write_text('x')",
        "each changes whenever vLLM is imported",
        False,
    ),
    "a folder that stays": ("kept = tempfile.mkdtemp(prefix='kept-', dir=cache)", "which servers would remove", False),
}


@pytest.mark.parametrize("what", WHILE_IMPORTING)
def test_what_imports_make(short: Path, what: str) -> None:
    place = Place(short)
    code, said, stands_by = WHILE_IMPORTING[what]
    lines = (f"cache = {str(short)!r}", "import os, pathlib, tempfile", *code.split("\n"))
    during = "        if name == 'vllm.version':\n" + "".join(f"            {line}\n" for line in lines)
    (place.extra / "sitecustomize.py").write_text(SITE.replace("        if name", f"{during}        if name", 1))
    standby = place.stand_by()
    assert (STARTED in place.log) == stands_by, place.log
    assert said is None or said in place.log
    if stands_by:
        assert place.log.count("begins again") == (said is not None)
        done = place.run("import os, rich; print(rich._IMPORT_CWD == os.getcwd())", cwd=place.bin)
        assert is_served(done), done.stderr
        assert done.stdout == "True\n"
        end(standby)


def test_a_standby_that_was_killed_is_none(short: Path) -> None:
    place = Place(short)
    standby = place.stand_by()
    program = place.start(TELL)
    assert program.stdout is not None
    pids = dict(program.stdout.readline().split() for _ in range(2))
    standby.kill()
    standby.wait()
    assert [*(short / "at").glob("*.sock")]
    done = place.run("print('it ran')")
    assert (done.stdout, "standby" in done.stderr) == ("it ran\n", False)
    program.send_signal(signal.SIGTERM)  # the servers that it has made go on
    assert program.stdout.readline() == "got 15\n"
    program.send_signal(signal.SIGQUIT)
    assert program.wait(30) == -signal.SIGQUIT
    os.kill(int(pids["child"]), signal.SIGKILL)
    again = place.stand_by(times=2)
    assert is_served(place.run("pass"))
    end(again)
    assert place.log.endswith("no longer standing by: ended\n")
