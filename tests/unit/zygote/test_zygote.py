"""A forked process is as a spawned one, and what cannot be is spawned."""

from __future__ import annotations

import multiprocessing
import sys
import time
from importlib.machinery import ModuleSpec
from multiprocessing.context import SpawnContext
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from tests import process
from vllm_compile_ext.zygote import NotForkedError, context, front

# A program makes its zygote, then changes what a spawned process would inherit.
BEGIN = """
import multiprocessing, os, resource, signal, sys, time, logging
from multiprocessing import context as stock
from tests.unit.zygote import spawned
from vllm_compile_ext.zygote import child, front, reads, context, zygote, NotForkedError

signal.signal(signal.SIGINT, signal.default_int_handler)  # in a background job it is ignored

said = []
class Handler(logging.Handler):
    def emit(self, record):
        said.append(record.getMessage())
logging.getLogger("vllm_compile_ext").addHandler(Handler())
logging.getLogger("vllm_compile_ext").setLevel("INFO")

def begin():
    reads.watch()
    os.environ.get("READ_BEFORE")
    os.environ.setdefault("KMP_OF_AN_IMPORT", "1")  # as scikit-learn does
    front.make()
    assert front.wanted(), front._why

def run(found, target=spawned.tell, name="Example", **options):
    ours, theirs = found.Pipe()
    made = found.Process(target=target, args=(theirs,), name=name, **options)
    made.start()
    theirs.close()
    value = ours.recv()
    made.join()
    return value, made.pid, made.exitcode
"""


def run(code: str, tmp_path: Path, **env: str) -> Any:
    outcome = process.run(BEGIN + "\nif __name__ == '__main__':\n" + code, folder=tmp_path, **env)
    assert outcome.code == 0, outcome.output
    return outcome.value


def differences(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    return {name: (one[name], other[name]) for name in one if one[name] != other[name]}


def test_it_is_as_a_spawned_one(tmp_path: Path) -> None:
    spawned, forked, pids, said = run(
        """
    begin()
    os.environ |= {"NEW": "1", "HF_HUB_OFFLINE": "0"}
    del os.environ["VLLM_NO_USAGE_STATS"]
    os.makedirs("elsewhere"); os.chdir("elsewhere")
    os.umask(0o027)
    resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.signal(signal.SIGINT, lambda *_: None)
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR2])
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    sys.argv.append("--more"); sys.path.append("/nowhere")
    a = run(stock.SpawnContext())
    b = run(context.Context())
    os.chdir("..")
    report([a[0], b[0], [a[1], b[1], os.getpid()], said])
        """,
        tmp_path,
    )
    assert said == []
    assert len(set(pids)) == 3
    assert differences(forked, spawned) == {}


def test_so_is_one_below(tmp_path: Path) -> None:
    spawned, forked, said = run(
        """
    begin()
    def two(found):
        ours, theirs = found.Pipe()
        made = found.Process(target=spawned.below, args=(theirs,), name="Above")
        made.start()
        (seen, above, pid), code = ours.recv(), ours.recv()
        made.join()
        assert seen["parent"][:3] == (above, above, "Above") and above == made.pid, (seen["parent"], above)
        return {k: v for k, v in seen.items() if k != "parent"}, code, made.exitcode
    report([two(stock.SpawnContext()), two(context.Context()), said])
        """,
        tmp_path,
    )
    assert said == []
    assert differences(forked[0], spawned[0]) == {}
    assert forked[1:] == spawned[1:] == [0, 0]


@pytest.mark.parametrize("how", ["nothing", "exit 3", "raise", "killed", "at once", "terminate", "interrupt"])
def test_it_ends_as_a_spawned_one(how: str, tmp_path: Path) -> None:
    outcome = process.run(
        BEGIN
        + f"""
def end(found):
    made = found.Process(target=spawned.end, args=({how!r},))
    made.start()
    if {how!r} in ("terminate", "interrupt"):
        time.sleep(0.1)
        while "waiting" not in open("output.txt").read().splitlines()[-1:]:
            time.sleep(0.05)
        os.kill(made.pid, signal.SIGTERM if {how!r} == "terminate" else signal.SIGINT)
    made.join()
    print("ended", flush=True)
    return made.exitcode

if __name__ == "__main__":
    begin()
    report([end(stock.SpawnContext()), end(context.Context()), said])
""",
        folder=tmp_path,
    )
    assert outcome.code == 0, outcome.output
    spawned, forked, said = outcome.value
    assert said == []
    assert forked == spawned
    first, second = outcome.output.split("ended\n")[:2]
    numbers = {character for character in "0123456789"}
    plain = ["".join(c for c in text if c not in numbers) for text in (first, second)]
    assert ("atexit of" in first, "RuntimeError" in first) == ("atexit of" in second, "RuntimeError" in second), plain


def test_locks_queues_and_random_numbers(tmp_path: Path) -> None:
    value, pids, drawn, said = run(
        """
    import numpy
    begin()
    found = context.Context()
    lock, queue, value = found.Lock(), found.Queue(), found.Value("i", 0)
    made = [found.Process(target=spawned.count, args=(lock, value, queue)) for _ in range(4)]
    for each in made: each.start()
    pids = {queue.get() for _ in made}
    for each in made: each.join()
    assert pids == {each.pid for each in made}
    drawn = [run(found, spawned.numbers)[0] for _ in range(2)]
    report([value.value, len(pids), drawn, said])
        """,
        tmp_path,
    )
    assert (value, pids, said) == (400, 4, [])
    assert len({number for pair in drawn for number in pair}) == 4


# What is done after the zygote was made, and what the line says of it.
REASONS: dict[str, tuple[str, str | None]] = {
    "a variable that was read": ("os.environ['READ_BEFORE'] = '1'", "READ_BEFORE changed after it may have been read"),
    "one that an import has set": ("os.environ['KMP_OF_AN_IMPORT'] = '2'", "KMP_OF_AN_IMPORT changed after"),
    "a native one": ("os.environ['MKL_NUM_THREADS'] = '1'", "MKL_NUM_THREADS changed after"),
    "an allocator": ("os.environ['LD_PRELOAD'] = '/lib/libtcmalloc.so'", "LD_PRELOAD was changed"),
    "threads of no number": ("os.environ['OMP_NUM_THREADS'] = 'all'", "OMP_NUM_THREADS was set to 'all'"),
    "a library's folder": (
        "os.environ['LD_LIBRARY_PATH'] = f\"{os.environ.get('LD_LIBRARY_PATH', '')}:{os.path.dirname(os.__file__)}\"",
        None,
    ),
    "libraries": (
        "open('libany.so.1', 'w').close(); os.environ['LD_LIBRARY_PATH'] = os.getcwd()",
        "LD_LIBRARY_PATH changed",
    ),
    "a folder of sockets": (
        "open('u.sock', 'w').close()\n"
        "    os.environ['LD_LIBRARY_PATH'] = f\"{os.environ.get('LD_LIBRARY_PATH', '')}:{os.getcwd()}\"",
        None,
    ),
    "session": ("os.setsid()", "the process group or session is not as it was"),
    "error": ("context.Surroundings = lambda: 1 / 0", "ZeroDivisionError"),
    "stopped": (
        "zygote._PATIENCE = 1; os.kill(front._zygote.pid, signal.SIGSTOP); os.environ['LARGE'] = 'x' * 100_000",
        "the zygote does not answer",
    ),
    "a child that fails": ("child.follow_environment = None; front.end(); front.make()", "TypeError"),
    "priority": ("os.nice(1)", "the priority is not as it was"),
    "executable": ("multiprocessing.set_executable('/bin/true2')", "Python's executable is not as it was"),
    "killed": ("os.kill(front._zygote.pid, signal.SIGKILL); time.sleep(0.2)", "the zygote does not answer"),
}


@pytest.mark.parametrize("name", REASONS)
def test_it_is_spawned_where_it_would_differ(name: str, tmp_path: Path) -> None:
    change, line = REASONS[name]
    code, said, states = run(
        f"""
    begin()
    {change}
    if {name!r} == "executable":
        python = sys.executable
        launch = context._Spawned._launch
        def spawn(self, made):
            multiprocessing.set_executable(python)
            launch(self, made)
        context._Spawned._launch = spawn
    (seen, pid, code) = run(context.Context())
    assert seen["environ"] == dict(os.environ)
    below = open(f"/proc/self/task/{{os.getpid()}}/children").read().split()
    report([code, said, [open(f"/proc/{{pid}}/stat").read().rpartition(")")[2].split()[0] for pid in below]])
        """,
        tmp_path,
    )
    assert code == 0
    if line is None:
        assert said == []
        return
    (found,) = said
    assert found.startswith("Example is spawned and imports everything again, not forked: ")
    assert line in found
    assert "Z" not in states


# What there is before the zygote is to be made.
NONE = {
    "thread": (
        "import threading; threading.Thread(target=time.sleep, args=(60,), daemon=True, name='T').start()",
        "(T)",
    ),
    "tracer": ("sys.settrace(lambda *_: None)", "a debugger, a profiler or a coverage tool"),
    "profiler": ("sys.setprofile(lambda *_: None)", "a debugger, a profiler or a coverage tool"),
    "ray": ("import types; sys.modules['ray'] = types.SimpleNamespace(is_initialized=lambda: True)", "Ray"),
    "driver": ("front._cuda_started = lambda: True", "the CUDA driver has been started"),
    "wsl": ("import platform; u = platform.uname(); platform.uname = lambda: u._replace(release='5-Microsoft')", "WSL"),
    "native debugger": ("os.environ['CUDA_INJECTION64_PATH'] = '/x'", "a native debugger or profiler"),
    "nobody watched": ("", "nobody noted what its imports read"),
    "rocm": (
        "import types; sys.modules['torch'] = types.SimpleNamespace(version=types.SimpleNamespace(hip='6'))",
        "CUDA",
    ),
}


@pytest.mark.parametrize("name", NONE)
def test_none_is_made_where_a_fork_would_be_broken(name: str, tmp_path: Path) -> None:
    before, line = NONE[name]
    why, wanted = run(
        f"""
    {before}
    front.make()
    try:
        front.zygote()
    except NotForkedError as error:
        report([str(error), front.wanted()])
        """,
        tmp_path,
    )
    assert line in why
    assert wanted


def test_nothing_is_left_when_the_program_is_killed(tmp_path: Path) -> None:
    outcome = process.run(
        BEGIN + "\nif __name__ == '__main__':\n    begin()\n    report(front._zygote.pid)\n"
        "    sys.stdout.flush()\n    os.kill(os.getpid(), signal.SIGKILL)\n",
        folder=tmp_path,
    )
    assert outcome.code == -9
    for _ in range(100):
        if not Path(f"/proc/{outcome.value}").exists() or ") Z" in Path(f"/proc/{outcome.value}/stat").read_text():
            return
        time.sleep(0.05)
    pytest.fail("the zygote is still there")


def test_vllms_command_makes_it_once_it_has_imported_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str | None] = []
    monkeypatch.setattr(front, "make", made.append)
    for argv, method, main in (
        (["/bin/vllm", "serve", "model"], None, None),
        (["/bin/vllm", "serve", "model"], "spawn", None),
        (["/x/main.py", "serve", "model"], None, "vllm.entrypoints.cli.main"),
        (["/x/api_server.py", "--model", "model"], None, "vllm.entrypoints.openai.api_server"),
        (["/x/my_api_server.py", "serve"], None, None),
        (["/bin/vllm", "bench", "latency"], None, None),
    ):
        module: Any = ModuleType("vllm.any")
        module.cli_env_setup = lambda: made.append("stock")
        monkeypatch.setattr(sys, "argv", argv)
        monkeypatch.setattr(sys.modules["__main__"], "__spec__", main and ModuleSpec(main, None))
        monkeypatch.delenv(front.METHOD, raising=False)
        if method:
            monkeypatch.setenv(front.METHOD, method)
        front._watch(module)
        module.cli_env_setup()
    why = f"{front.METHOD}=spawn is set"
    assert made == ["stock", None, "stock", why, "stock", None, "stock", None, "stock", "stock"]


@pytest.mark.parametrize(
    ("model", "multimodal", "reason"),
    [
        ("llama", None, None),
        ("whisper", None, "Whisper"),
        ("llava", "torch_shm", "torch_shm"),
        ("llava", "direct", None),
    ],
)
def test_what_vllm_itself_advises_against(model: str, multimodal: str | None, reason: str | None) -> None:
    of_model = SimpleNamespace(
        hf_config=SimpleNamespace(model_type=model),
        multimodal_config=multimodal and SimpleNamespace(mm_tensor_ipc=multimodal),
    )
    found = context.reason_to_spawn(SimpleNamespace(model_config=of_model))
    assert (reason is None and found is None) or (reason is not None and found is not None and reason in found)


def test_stock_decides_over_the_method(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "wanted", lambda: True)
    for method, ours in (("spawn", True), ("fork", False)):
        found = context.get_mp_context(lambda method=method: multiprocessing.get_context(method))()
        assert isinstance(found, context.Context) is ours
    monkeypatch.setattr(front, "wanted", lambda: False)
    assert type(context.get_mp_context(lambda: multiprocessing.get_context("spawn"))()) is SpawnContext


def test_openmps_threads_follow_each_on_its_processor(tmp_path: Path) -> None:
    spawned, forked, said = run(
        """
    import torch
    begin()
    processors = sorted(os.sched_getaffinity(0))[:2]
    os.environ |= {"OMP_NUM_THREADS": str(len(processors)), "GOMP_CPU_AFFINITY": " ".join(map(str, processors))}
    report([run(stock.SpawnContext(), spawned.compute)[0], run(context.Context(), spawned.compute)[0], said])
        """,
        tmp_path,
        OPENBLAS_NUM_THREADS="1",
    )
    assert said == []
    assert forked == spawned


def test_inductors_settings_and_those_of_metrics_follow(tmp_path: Path) -> None:
    spawned, forked, said = run(
        """
    from torch._inductor import config
    import prometheus_client
    begin()
    os.environ |= {"TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_CPP_DYNAMIC_THREADS": "1"}
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.getcwd()
    report([*(run(each, spawned.settings)[0] for each in (stock.SpawnContext(), context.Context())), said])
        """,
        tmp_path,
    )
    assert said == []
    assert forked == spawned
    assert spawned[:2] == [1, True]


def test_metrics_that_were_made_before_stay_as_they_are(tmp_path: Path) -> None:
    (line,) = run(
        """
    import prometheus_client
    prometheus_client.Counter("a", "b")
    begin()
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = os.getcwd()
    run(context.Context())
    report(said)
        """,
        tmp_path,
    )
    assert "PROMETHEUS_MULTIPROC_DIR was set after metrics were made" in line


def test_files_that_the_command_was_given_stay_its_own(tmp_path: Path) -> None:
    open_files, said = run(
        """
    os.set_inheritable(os.open("given", os.O_CREAT), True)  # as of `flock`, or a shell's redirection
    begin()
    report([run(context.Context(), spawned.files)[0], said])
        """,
        tmp_path,
    )
    assert said == []
    assert not any("given" in name for name in open_files)


def test_whatever_goes_wrong_the_command_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(front, "reason_to_spawn", lambda: 1 / 0)
    monkeypatch.setattr(front, "_zygote", None)
    monkeypatch.setattr(front, "_why", "")
    front.make()
    with pytest.raises(NotForkedError, match="ZeroDivisionError"):
        front.zygote()


def test_arguments_that_cannot_be_read_are_told_of(tmp_path: Path) -> None:
    outcome = process.run(
        BEGIN
        + """
if __name__ == "__main__":
    begin()
    codes = []
    for found in (stock.SpawnContext(), context.Context()):
        made = found.Process(target=spawned.tell, args=(spawned.Unreadable(),))
        made.start()
        made.join()
        codes.append(made.exitcode)
    report([codes, said])
""",
        folder=tmp_path,
    )
    assert outcome.value == [[1, 1], []]
    assert outcome.output.count("ValueError: unreadable") == 2


def test_after_the_zygote_has_ended_every_process_is_spawned(tmp_path: Path) -> None:
    codes, said = run(
        """
    begin()
    os.kill(front._zygote.pid, signal.SIGKILL)
    report([[run(context.Context())[2] for _ in range(2)], said])
        """,
        tmp_path,
    )
    assert codes == [0, 0]
    assert [line.startswith("Example is spawned") for line in said] == [True, True]
