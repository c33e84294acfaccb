"""The store on the volumes that people have, with real users, groups and mounts, and vLLM's toy models on top.

A start is a fork, in a mount namespace of its own; it becomes the user before it looks at the store.  No NFS server
runs where these tests do: an overlay stands in for a file system that is not the usual one, and
`tests/unit/store/test_write.py` has what NFS and SMB do differently.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pytest

from tests import process

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(os.geteuid() != 0, reason="only root can mount and become other users"),
]

CODE = """
    import ctypes, os, subprocess
    from pathlib import Path
    from tests import forks, toys

    if ctypes.CDLL(None, use_errno=True).unshare(0x00020000):  # CLONE_NEWNS
        report({"mounts": os.strerror(ctypes.get_errno())})
        sys.exit()

    def sh(command):
        subprocess.run(command, shell=True, check=True)

    sh("mount --make-rprivate /; mount -t tmpfs -o mode=755 none /mnt")
    # Python, its headers and this repository have to be there for every user.
    needed = {Path(p).resolve() for p in (sys.base_prefix, sys.prefix, os.path.dirname(toys.__file__) + "/..")}
    shut = {p: [a for a in p.parents if not a.stat().st_mode & 0o001] for p in needed}
    for number, path in enumerate(p for p in needed if shut[p]):
        sh(f"mkdir /mnt/{number}; mount --bind '{path}' /mnt/{number}")
    for top in {tops[-1] for tops in shut.values() if tops}:
        sh(f"mount -t tmpfs -o mode=755 none '{top}'")
    for number, path in enumerate(p for p in needed if shut[p]):
        sh(f"mkdir -p '{path}'; mount --bind /mnt/{number} '{path}'")

    class User:
        def __init__(self, uid, gid, groups=()):
            self.uid, self.gid, self.groups = uid, gid, groups

        def become(self):
            os.setgroups(self.groups)
            os.setresgid(self.gid, self.gid, self.gid)
            os.setresuid(self.uid, self.uid, self.uid)

    NUMBER = iter(range(1000))

    def start(user, folder, group="0"):
        # Nothing but the store is the same in two starts.
        root = Path(f"/home/{next(NUMBER)}")
        root.mkdir(mode=0o700)
        os.chown(root, user.uid, user.gid)
        env = {"HOME": str(root), "USER": "pod", "TORCHINDUCTOR_CACHE_DIR": str(root)}
        env |= {"VLLM_COMPILE_STORE": str(folder), "VLLM_COMPILE_STORE_GROUP": group}
        return toys.start(root, toys.Single, {}, user.become, **env).end()

    def command(user, folder, *args, group="0"):
        def function():
            user.become()
            os.environ.update(VLLM_COMPILE_STORE=str(folder), VLLM_COMPILE_STORE_GROUP=group)
            from typer.testing import CliRunner
            from vllm_compile_ext.cli import app
            return CliRunner().invoke(app, list(args)).output
        return forks.run(function).value

    sh("mount -t tmpfs -o mode=755 none /home; mount -t tmpfs -o mode=1777 none /var/tmp")
    A, B, OTHER, ROOT = User(1001, 1001, [2000]), User(1002, 1002, [2000]), User(1003, 1003), User(0, 0)

    def volume(name, mode, group=0, mount=False):
        path = Path("/mnt", name)
        path.mkdir()
        if mount:
            sh(f"mount -t tmpfs none '{path}'")
        os.chown(path, 0, group)
        path.chmod(mode)
        return path

    out = {}
    v = volume("fsgroup", 0o2775, 2000)
    out["fsgroup, not told"] = [start(A, v)]
    out["fsgroup"] = [start(A, v, "1"), start(B, v, "1"), start(OTHER, v, "1"), start(B, v)]
    modes = {oct(p.stat().st_mode & 0o7777) + (" d" if p.is_dir() else "") for p in v.rglob("*") if "jit" not in str(p)}
    out["modes"] = sorted(modes)
    out["fsgroup ls"] = [command(B, v, "cache", "ls", group="1"), command(OTHER, v, "cache", "ls", group="1")]
    out["fsgroup gc"] = command(B, v, "cache", "gc", "--max-gb", "0", group="1")
    out["fsgroup"].append(start(A, v, "1"))

    v = volume("openshift", 0o2775, 0)
    pods = User(1000710000, 0), User(1000720000, 0)
    out["openshift"] = [start(pods[0], v, "1"), start(pods[1], v, "1")]

    v = volume("emptydir", 0o777, mount=True)
    out["emptydir, itself"] = [start(A, v)]
    out["emptydir"] = [start(A, v / "store"), start(A, v / "store"), start(B, v / "store")]
    v = volume("emptydir of a group", 0o2777, 2000, mount=True)
    out["emptydir of a group"] = [start(A, v, "1"), start(A, v, "1"), start(B, v, "1")]

    v = volume("hostpath", 0o755)
    out["hostpath"] = [start(ROOT, v), start(ROOT, v)]

    v = volume("Größe und \\u00e9\\u4e2d' \\"x", 0o755)
    out["name"] = [start(ROOT, v), start(ROOT, v)]
    out["name verify"] = command(ROOT, v, "cache", "verify")

    v = volume("layer", 0o755)
    out["layer"] = [start(ROOT, v / "store")]
    sh("mkdir -p /mnt/merged /mnt/o; mount -t tmpfs none /mnt/o; mkdir /mnt/o/up /mnt/o/work; chmod 755 /mnt/o")
    sh("mount -t overlay -o lowerdir=/mnt/layer,upperdir=/mnt/o/up,workdir=/mnt/o/work none /mnt/merged")
    merged = "/mnt/merged/store"
    out["overlay"] = [start(ROOT, merged)]
    out["overlay gc"] = command(ROOT, merged, "cache", "gc", "--max-gb", "0")
    out["overlay"] += [start(ROOT, merged), start(ROOT, merged)]
    sh("mount --bind /mnt/layer /mnt/layer; mount -o remount,ro,bind /mnt/layer")
    out["layer"] += [start(ROOT, v / "store"), start(A, v / "store")]
    sh("mount -o remount,rw,bind /mnt/layer; chown -R 1003 /mnt/layer/store; mount -o remount,ro,bind /mnt/layer")
    out["layer of another"] = [start(A, v / "store"), start(ROOT, v / "store")]

    v = volume("open", 0o777)  # no volume of its own: others can put anything there
    out["below an open folder"] = [start(A, v / "store")]
    v = volume("sticky", 0o1777)
    out["below a sticky folder"] = [start(A, v / "store"), start(A, v / "store")]
    report(out)
"""


@pytest.fixture(scope="module")
def volumes() -> dict[str, Any]:
    folder = Path(tempfile.mkdtemp())  # where all users can write what they found
    folder.chmod(0o1777)
    outcome = process.run(CODE, folder=folder, fork=True)
    shutil.rmtree(folder)
    assert outcome.value is not None, outcome.output[-5000:]
    if "mounts" in outcome.value:
        pytest.skip(f"mounting is not allowed here: {outcome.value['mounts']}")
    return outcome.value


COLD, WARM, REFUSED = [0, 1, 1], [1, 0, 0], [0, 1, 0]  # loaded, compiled, kept


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("fsgroup, not told", [REFUSED]),
        # Two of the group, one who is not in it, one who does not share with it, and one after `cache gc`.
        ("fsgroup", [COLD, WARM, REFUSED, REFUSED, COLD]),
        # Users at random in the group of root.
        ("openshift", [COLD, WARM]),
        ("emptydir, itself", [REFUSED]),
        ("emptydir", [COLD, WARM, REFUSED]),
        ("emptydir of a group", [COLD, WARM, REFUSED]),  # anyone can have made what is in it
        ("hostpath", [COLD, WARM]),
        ("name", [COLD, WARM]),
        ("layer", [COLD, WARM, REFUSED]),
        ("layer of another", [REFUSED, REFUSED]),
        # One after `cache gc`.
        ("overlay", [WARM, COLD, WARM]),
        ("below an open folder", [REFUSED]),
        ("below a sticky folder", [COLD, WARM]),
    ],
)
def test_who_loads_and_keeps(volumes: dict[str, Any], name: str, expected: list[list[int]]) -> None:
    assert [ended.counts() for ended in volumes[name]] == expected


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("fsgroup, not told", ("mode 2775, user 0, group 2000", "VLLM_COMPILE_STORE_GROUP=1")),
        ("emptydir, itself", ("VLLM_COMPILE_STORE=/mnt/emptydir/store",)),
        ("layer of another", ("belongs to user 1003",)),
        ("below an open folder", ("another store could be put in the place",)),
    ],
)
def test_a_refusal_says_why_or_the_way_out(volumes: dict[str, Any], name: str, words: tuple[str, ...]) -> None:
    assert any(all(word in line for word in words) for line in volumes[name][-1].warnings())


def test_what_commands_say(volumes: dict[str, Any]) -> None:
    assert volumes["modes"] == ["0o2770 d", "0o660"], "of files for a group"
    mine, others = volumes["fsgroup ls"]
    assert "Single" in mine
    assert "can be written by other users" in others
    assert "removed" in volumes["fsgroup gc"]
    assert "removed" in volumes["overlay gc"]
    assert "all digests match" in volumes["name verify"]
