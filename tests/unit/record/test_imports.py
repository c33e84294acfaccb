"""Imports are timed, modules are met when they have been imported, and imports are otherwise what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests import process

PTH = process.ROOT / "vllm_compile_ext.pth"

CODE = """
    import pathlib, time
    folder = pathlib.Path("lib"); folder.mkdir()
    (folder / "torch.py").write_text("import time; time.sleep(0.05); import inner; import numpy")
    (folder / "numpy.py").write_text("import time; time.sleep(0.03)")
    (folder / "inner.py").write_text("")
    (folder / "bad.py").write_text("raise ValueError('no')")
    (folder / "broken.py").write_text("import numpy_is_not_here")
    sys.path.insert(0, "lib")
    from vllm_compile_ext.record import imports
    observer = imports.install()
    assert imports.install() is observer
"""


def run(code: str, **env: str | None) -> Any:
    outcome = process.run(CODE + code, **env)
    assert outcome.code == 0, outcome.output
    return outcome.value


def test_heavy_ones_and_outermost_ones_are_timed() -> None:
    found = run("""
    import torch
    import inspect
    report([[i.name, i.around and i.around.name, i.end - i.start] for i in observer.intervals])
    """)
    assert [row[:2] for row in found][:2] == [["numpy", "torch"], ["torch", None]]
    assert "inner" not in [row[0] for row in found]
    assert found[1][2] > found[0][2] > 30_000_000


def test_modules_look_as_ever() -> None:
    value = run("""
    import importlib, inspect, torch
    spec = torch.__spec__
    found = importlib.util.find_spec("inner")
    report([type(spec.loader).__name__, list(vars(spec.loader)), inspect.getsource(torch)[:11],
            type(torch.__loader__).__name__, importlib.reload(torch) is torch, found is not None])
    """)
    assert value == ["SourceFileLoader", ["name", "path"], "import time", "SourceFileLoader", True, True]


def test_errors_come_through() -> None:
    value = run("""
    said = []
    for name in ("bad", "broken", "nowhere"):
        try:
            __import__(name)
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    report([said, "bad" in sys.modules, observer.current() is None])
    """)
    missing = [f"ModuleNotFoundError: No module named '{name}'" for name in ("numpy_is_not_here", "nowhere")]
    assert value == [["ValueError: no", *missing], False, True]


def test_hooks_are_called_once_when_their_module_is_there() -> None:
    value = run("""
    met = []
    def bad(module):
        raise RuntimeError("surprise")
    observer.when("inner", bad)
    observer.when("inner", lambda module: met.append(module.__name__))
    import torch
    observer.when("inner", lambda module: met.append("now"))
    import importlib
    importlib.reload(sys.modules["inner"])
    report([met, observer.errors])
    """)
    assert value == [["inner", "now"], ["inner: RuntimeError: surprise"]]


def test_nothing_is_kept_when_the_start_is_over() -> None:
    value = run("""
    observer.watching = False
    met = []
    observer.when("inner", lambda module: met.append(1))
    import torch
    report([len(observer.intervals), met])
    """)
    assert value == [0, [1]]


def pth(folder: Path, *, argv: str = "", **env: str | None) -> Any:
    """Whether the .pth file's line did something in a process."""
    code = f"""
    sys.orig_argv = [*sys.orig_argv, {argv!r}]
    exec(open({str(PTH)!r}).read())
    module = sys.modules.get("vllm_compile_ext.record.imports")
    report([module is not None, bool(module) and module.observer in sys.meta_path])
    """
    outcome = process.run(code, folder=folder, **env)
    assert outcome.code == 0, outcome.output
    return outcome.value


def test_the_pth_file_does_nothing_in_other_programs(tmp_path: Path) -> None:
    assert pth(tmp_path) == [False, False]


def test_the_pth_file_watches_vllm(tmp_path: Path) -> None:
    assert pth(tmp_path, argv="/bin/vllm") == [True, True]
    assert pth(tmp_path, VLLM_COMPILE_STARTS="1") == [True, True]
    assert pth(tmp_path, _VLLM_COMPILE_EXT_START="1 ") == [True, True]


def test_the_pth_file_watches_nothing_where_the_record_is_off(tmp_path: Path) -> None:
    for name in ("VLLM_COMPILE_EXT", "VLLM_COMPILE_STARTS"):
        assert pth(tmp_path, argv="/bin/vllm", **{name: "0"}) == [True, False]
    assert pth(tmp_path, argv="/bin/vllm", VLLM_PLUGINS="other") == [True, False]


def test_the_pth_file_is_one_line() -> None:
    (line,) = PTH.read_text().splitlines()
    assert line.startswith("import ")
