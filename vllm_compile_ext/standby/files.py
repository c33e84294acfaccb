"""What imports read of the file system, noted while they do, to tell later whether they would read the same again.

Noted are files that are opened, paths that are asked for (there or not), folders that are listed, modules and libraries
that are loaded, and names that are looked for and not found.  Bytecode is not: Python checks it against its source.
"""

from __future__ import annotations

import builtins
import io
import os
import re
import ssl
import sys
from collections.abc import Callable
from importlib.machinery import all_suffixes
from pathlib import Path
from stat import S_ISDIR
from typing import Any

Identity = tuple[int, ...] | None  # None: there is no such file


class Files:
    """Notes from its making on, until `stop`."""

    def __init__(self, began: int) -> None:
        """began: unix ns before which everything was there."""
        self._began, self._on, self._folder = began, True, os.getcwd()
        self._paths: dict[str, Identity] = {}
        self._listed: dict[str, set[str]] = {}
        self._asked_for_folder = set[str]()
        self._made = set[str]()
        self.temporary = set[str]()
        self.sought = set[str]()
        self._stock: dict[tuple[Any, str], Any] = {}
        for owner, name in ((os, "stat"), (os, "lstat"), (os, "open"), (io, "open"), (builtins, "open")):
            self._replace(owner, name, self._noting(getattr(owner, name)))
        for name in ("listdir", "scandir"):
            self._replace(os, name, self._listing(getattr(os, name)))
        self._replace(os, "mkdir", self._mkdir)
        self._replace(os, "getcwd", self._getcwd)
        sys.meta_path.insert(0, self)

    def _replace(self, owner: Any, name: str, by: Any) -> None:
        self._stock[owner, name] = getattr(owner, name)
        setattr(owner, name, by)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Find nothing, and note what is looked for."""
        self.sought.add(name.partition(".")[0])

    def _note(self, path: Any) -> None:
        if isinstance(path, bytes | os.PathLike):
            path = os.fsdecode(path)
        if self._on and isinstance(path, str) and _may_change(path) and path not in self._paths:
            self._paths[path] = self._identity(path)

    def _noting(self, stock: Any) -> Any:
        def noting(path: Any, *arguments: Any, **options: Any) -> Any:
            how = next(iter(arguments), options.get("mode"))
            writes = how & _WRITES if isinstance(how, int) else {*(how or "")} & {*"wax+"}
            if options.get("dir_fd") is None and not writes:
                self._note(path)
            return stock(path, *arguments, **options)

        return noting

    def _listing(self, stock: Any) -> Any:
        def listing(path: Any = ".", *arguments: Any) -> Any:
            if isinstance(path, str | bytes | os.PathLike):
                self._list(os.fsdecode(path))
            return stock(path, *arguments)

        return listing

    def _list(self, folder: str) -> None:
        if self._on and _may_change(folder) and folder not in self._listed:
            self._listed[folder] = self._names(folder)

    def _mkdir(self, path: Any, *arguments: Any, **options: Any) -> None:
        self._stock[os, "mkdir"](path, *arguments, **options)
        if self._on and options.get("dir_fd") is None:
            self._made.add(os.fsdecode(path))
            if sys._getframe(1).f_globals.get("__name__") == "tempfile":
                self.temporary.add(os.fsdecode(path))

    def _identity(self, path: str) -> Identity:
        try:
            found = self._stock[os, "stat"](path)
        except (OSError, ValueError):
            return None
        kind = found.st_mode, found.st_dev, found.st_ino, found.st_uid
        if S_ISDIR(found.st_mode):  # what is in it counts where it is listed
            return kind
        return *kind, found.st_size, found.st_mtime_ns, found.st_ctime_ns

    def _names(self, folder: str) -> set[str]:
        try:
            return {*self._stock[os, "listdir"](folder)} - {"__pycache__"}
        except OSError:
            return set()

    def _getcwd(self) -> str:
        frame = sys._getframe(1)
        while frame.f_back is not None and frame.f_globals.get("__name__") in _GO_BETWEENS:
            frame = frame.f_back
        self._asked_for_folder.add(str(frame.f_globals.get("__name__")))
        return str(self._stock[os, "getcwd"]())

    def stop(self) -> str | None:
        """Note no more, but all that is loaded by now; returns a path that has changed since `began`, if any.

        `temporary` then are the temporary folders that imports have made and not removed.
        """
        modules = list(sys.modules.values())
        for folder in {*sys.path, *(path for module in modules for path in _folders(module))}:
            self._list(folder)  # importlib has done so, by functions of its own
        self._on = False
        for (owner, name), stock in self._stock.items():
            setattr(owner, name, stock)
        sys.meta_path.remove(self)
        loaded = {str(getattr(getattr(module, "__spec__", None), "origin", None)) for module in modules}
        loaded |= {*re.findall(r" (/\S.*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)}
        for path in loaded:
            if not path.startswith("/") or not _may_change(path):
                continue
            self._paths[path] = found = self._identity(path)
            if found is None or found[-1] >= self._began:
                return path
        for path in _read_by_libraries():
            self._paths[path] = self._identity(path)
        for folder in self._made:  # as imports of the next process do
            self._paths.pop(folder, None)
            if self._identity(folder) is None:
                self._forget(folder)
        self.temporary = {folder for folder in self.temporary if self._identity(folder) is not None}
        return self.changed()

    def _forget(self, folder: str) -> None:
        """What was in a folder that imports have made and removed."""
        for noted in (self._paths, self._listed):
            for path in [path for path in noted if path == folder or path.startswith(f"{folder}/")]:
                del noted[path]

    def changed(self) -> str | None:
        """The first path under which imports would read something else; None: all is as it was."""
        for path, found in self._paths.items():
            if self._identity(path) != found:
                return path
        return next((path for path, names in self._listed.items() if self._names(path) != names), None)

    def differs_in(self, folder: str) -> str | None:
        """A path that imports have asked for relative to the working folder, which is another in `folder`."""
        for path, found in self._paths.items():
            if not path.startswith("/") and self._identity(f"{folder}/{path}") != found:
                return path
        listed = ((path, names) for path, names in self._listed.items() if not path.startswith("/"))
        return next((path for path, names in listed if self._names(f"{folder}/{path}") != names), None)

    def hidden_by(self, folder: str) -> str | None:
        """A module that an import would find in a program's own folder, which comes first on the search path."""
        suffixes = "|".join(map(re.escape, sorted(all_suffixes(), key=len, reverse=True)))
        known = self.sought | {name.partition(".")[0] for name in sys.modules}
        for name in self._names(folder):
            module, path = re.sub(rf"({suffixes})$", "", name), str(Path(folder, name))
            loaded = str(getattr(sys.modules.get(module), "__file__", None))
            is_module = module != name or Path(path).is_dir()
            if is_module and module in known and loaded != path and not loaded.startswith(f"{path}/"):
                return path
        return None

    def follow(self, folder: str) -> str | None:
        """Have what was asked for the working folder believe that it was `folder`; returns a module that cannot."""
        if folder == self._folder:
            return None
        if strange := sorted(self._asked_for_folder - _KEEP_FOLDER.keys()):
            return ", ".join(strange)
        for name, follow in _KEEP_FOLDER.items():
            if name in sys.modules:
                follow(folder)
        return None


def _may_change(path: str) -> bool:
    """What /proc, /sys and /dev say is the machine's: `facts` compares what of it may differ."""
    machine = path.startswith(("/proc/", "/sys/", "/dev/", "/memfd:", "/SYSV"))
    return not machine and not path.endswith(".pyc") and path != ""


def _folders(module: Any) -> list[str]:
    try:
        return [path for path in getattr(module, "__path__", ()) if isinstance(path, str)]
    except Exception:  # of a module that makes things up when it is asked
        return []


def _read_by_libraries() -> set[str]:
    """Files that are read where no Python code sees it: by OpenSSL, and by Python when it starts."""
    paths = ssl.get_default_verify_paths()
    certificates = {paths.openssl_cafile, paths.openssl_capath, str(Path(paths.openssl_cafile).parent / "openssl.cnf")}
    return {f"{sys.prefix}/pyvenv.cfg", *certificates, *(str(f) for each in sys.path for f in Path(each).glob("*.pth"))}


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


def _rich(folder: str) -> None:
    import rich

    rich._IMPORT_CWD = os.path.abspath(folder)


def _transformers(folder: str) -> None:
    module: Any = sys.modules["transformers.utils.auto_docstring"]  # a function of this name hides it
    module.PATH_TO_TRANSFORMERS = Path(folder, "src").resolve() / "transformers"


def _set_default(config: Any, name: str, value: str) -> None:
    """Of torch's modules of settings (torch/utils/_config_module.py, 2.13): not as if a user had set it."""
    config._config[name].default = value


_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
# What asks for somebody else.
_GO_BETWEENS = ("posixpath", "os", "pathlib", "pathlib._local", "genericpath")
# Modules that ask for the working folder when they are imported, and what they keep of it (Python 3.11, torch 2.13
# and 2.14, transformers 5.19): puts that right.
_KEEP_FOLDER: dict[str, Callable[[str], None]] = {
    "inspect": _nothing,
    "tempfile": _nothing,
    "multiprocessing.process": _multiprocessing,
    "torch._dynamo.config": _dynamo,
    "torch._inductor.config": _inductor,
    "rich": _rich,
    "transformers.utils.auto_docstring": _transformers,
}
