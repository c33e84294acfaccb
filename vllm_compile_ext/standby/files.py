"""What imports read of the file system, noted while they do, to tell later whether they would read the same again.

Noted are files that are opened, paths that are asked for (there or not), folders that are listed, modules and libraries
that are loaded, and names that are looked for and not found.  Bytecode is not: Python checks it against its source.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable
from importlib.machinery import all_suffixes
from pathlib import Path
from stat import S_ISDIR
from typing import Any

Identity = tuple[int, ...] | None  # None: there is no such file

# Modules that ask for the working folder when they are imported -> puts right what they keep of it.
_Follow = Callable[[str], None]


class Files:
    """Notes from its making on, until `stop`."""

    def __init__(self, began: int) -> None:
        """began: unix ns before which everything was there."""
        self._began, self._on, self._folder = began, True, os.getcwd()
        self._paths: dict[str, Identity] = {}
        self._listed: dict[str, set[str]] = {}
        self._asked_for_folder = set[str]()
        self.sought = set[str]()
        self._stock: dict[str, Any] = {name: getattr(os, name) for name in ("stat", "lstat", "getcwd")}
        sys.addaudithook(self._audit)  # for life: what it notes ends with `stop`
        os.stat, os.lstat = self._noting("stat"), self._noting("lstat")
        os.getcwd = self._getcwd
        sys.meta_path.insert(0, self)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Find nothing, and note what is looked for."""
        self.sought.add(name.partition(".")[0])

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._on:
            return
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                self._note(path)
        elif event in ("os.listdir", "os.scandir") and isinstance(arguments[0], str) and _may_change(arguments[0]):
            self._on = False
            self._listed.setdefault(arguments[0], _names(arguments[0]))
            self._on = True

    def _note(self, path: Any) -> None:
        if isinstance(path, bytes | os.PathLike):
            path = os.fsdecode(path)
        if self._on and isinstance(path, str) and _may_change(path) and path not in self._paths:
            self._paths[path] = _identity(self._stock["stat"], path)

    def _noting(self, name: str) -> Any:
        stock = self._stock[name]

        def noting(path: Any, *args: Any, **options: Any) -> Any:
            if options.get("dir_fd") is None:
                self._note(path)
            return stock(path, *args, **options)

        return noting

    def _getcwd(self) -> str:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") in _GO_BETWEENS:
            frame = frame.f_back
        self._asked_for_folder.add(str(frame.f_globals.get("__name__")))
        return str(self._stock["getcwd"]())

    def stop(self) -> str | None:
        """Note no more, but all that is loaded by now; returns a file that has changed since `began`, if any."""
        self._on = False
        for name, stock in self._stock.items():
            setattr(os, name, stock)
        sys.meta_path.remove(self)
        loaded = {getattr(getattr(module, "__spec__", None), "origin", None) for module in list(sys.modules.values())}
        loaded |= {*re.findall(r" (/\S.*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)}
        loaded |= {f"{sys.prefix}/pyvenv.cfg", *(str(file) for each in sys.path for file in Path(each).glob("*.pth"))}
        for path in loaded:
            if not isinstance(path, str) or not path.startswith("/") or not _may_change(path):
                continue
            self._paths[path] = found = _identity(os.stat, path)
            if found is not None and found[-1] >= self._began:
                return path
        for path, found in self._paths.items():
            if found is None and Path(path).is_dir():  # made by an import, as by those of the next process
                self._paths[path] = _identity(os.stat, path)
        return None

    def changed(self, folder: str) -> str | None:
        """The first path under which a process in `folder` would read something else; None: all is as it was."""
        for path, found in self._paths.items():
            if _identity(os.stat, os.path.join(folder, path)) != found:
                return path
        for path, names in self._listed.items():
            if _names(os.path.join(folder, path)) != names:
                return path
        return None

    def hidden_by(self, folder: str) -> str | None:
        """A module that an import would find in a program's own folder, which comes first on the search path."""
        suffixes = "|".join(map(re.escape, sorted(all_suffixes(), key=len, reverse=True)))
        for name in _names(folder):
            module, path = re.sub(rf"({suffixes})$", "", name), str(Path(folder, name))
            loaded = str(getattr(sys.modules.get(module), "__file__", None))
            is_module = module != name or Path(path).is_dir()
            if is_module and module in self.sought and loaded != path and not loaded.startswith(f"{path}/"):
                return path
        return None

    def follow(self, folder: str) -> str | None:
        """Have what was asked for the working folder believe that it was `folder`; returns a module that cannot."""
        if folder == self._folder:
            return None
        if strange := sorted(self._asked_for_folder - _KEEP_FOLDER.keys()):
            return strange[0]
        for name, follow in _KEEP_FOLDER.items():
            if name in sys.modules:
                follow(folder)
        return None


def _may_change(path: str) -> bool:
    """What /proc, /sys and /dev say is the machine's: `facts` compares what of it may differ."""
    return not path.startswith(("/proc/", "/sys/", "/dev/")) and not path.endswith(".pyc") and path != ""


def _identity(stat: Any, path: str) -> Identity:
    try:
        found = stat(path)
    except (OSError, ValueError):
        return None
    kind = found.st_mode, found.st_dev, found.st_ino, found.st_uid
    if S_ISDIR(found.st_mode):  # what is in it counts where it is listed
        return kind
    return *kind, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _names(folder: str) -> set[str]:
    try:
        return {*os.listdir(folder)} - {"__pycache__"}
    except OSError:
        return set()


def _nothing(folder: str) -> None: ...


def _multiprocessing(folder: str) -> None:
    from multiprocessing import process

    process.ORIGINAL_DIR = folder  # type: ignore[attr-defined]


def _dynamo(folder: str) -> None:
    from torch._dynamo import config

    if "TORCH_COMPILE_DEBUG_DIR" not in os.environ:
        _set_default(config, "debug_dir_root", os.path.join(folder, "torch_compile_debug"))


def _inductor(folder: str) -> None:
    from torch._inductor import config

    _set_default(config, "xpu.cutlass_dir", os.path.realpath(os.environ.get("TORCHINDUCTOR_CUTLASS_DIR", "")))


def _transformers(folder: str) -> None:
    module: Any = sys.modules["transformers.utils.auto_docstring"]  # a function of this name hides it
    module.PATH_TO_TRANSFORMERS = Path(folder, "src").resolve() / "transformers"


def _set_default(config: Any, name: str, value: str) -> None:
    """Of torch's modules of settings (torch/utils/_config_module.py, 2.13): not as if a user had set it."""
    config._config[name].default = value


# What asks for somebody else.
_GO_BETWEENS = ("posixpath", "os", "pathlib", "pathlib._local", "genericpath")
# Modules that ask for the working folder when they are imported, and what they keep of it (Python 3.11, torch 2.13
# and 2.14, transformers 5.19): puts that right.
_KEEP_FOLDER: dict[str, _Follow] = {
    "inspect": _nothing,
    "tempfile": _nothing,
    "multiprocessing.process": _multiprocessing,
    "torch._dynamo.config": _dynamo,
    "torch._inductor.config": _inductor,
    "transformers.utils.auto_docstring": _transformers,
}
