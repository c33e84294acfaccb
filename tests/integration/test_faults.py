"""The store under faults.  Each trial ends with a model that runs, or an engine that serves, and the right answer.

A trial is a start in a fork.  Where there are many, a toy model stands in, judged by itself in eager mode.  `make test`
runs a sample; with FULL=1 in the environment (`make faults`) each blob meets each kind of damage, and more
writers race and are killed.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import engine, process
from tests.conftest import FULL

pytestmark = pytest.mark.engine


COMMON = f"""
    import os, random, shutil, time
    from pathlib import Path
    from tests import forks
    FULL = {FULL}

    def blobs(root):
        return sorted(Path(root, "compile_store").glob("v1/blobs/*/*"))

    def truncate(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def another(path):  # a longer blob, cut, so that the size is right
        others = filter(Path.is_file, blobs(path.parents[4]))
        longer = max(others, key=lambda p: (p != path) * p.stat().st_size)
        path.write_bytes((longer.read_bytes() * 9)[: path.stat().st_size])

    def symlink(path):
        aside = path.with_name("aside")
        path.rename(aside)
        path.symlink_to(aside)

    def folder(path):
        path.unlink()
        path.mkdir()

    def newer(path):
        path.write_text(path.read_text().replace('"format":3', '"format":4'))

    def fresh():  # a copy of what the first cold start left
        shutil.rmtree("root", ignore_errors=True)
        shutil.copytree("made", "root")
"""

TOYS = (
    COMMON
    + """
    from tests import toys

    def trial(root="root", **env):
        return toys.start(root, **env).end()

    out = {"nothing": [trial("made"), trial("made")], "blobs": [], "manifests": {}}
    damages = (truncate, flip, another, symlink)
    for number in range(len(blobs("made"))):
        for damage in damages if FULL else [damages[number % 4]]:
            fresh()
            damage(blobs("root")[number])
            out["blobs"].append([trial(), trial()])
    for damage in (truncate, flip, symlink, folder, newer):
        fresh()
        for path in sorted(Path("root", "compile_store").glob("v1/manifests/*/*.json")):
            damage(path)
        out["manifests"][damage.__name__] = trial()

    started = [toys.start("race") for _ in range(8 if FULL else 4)]
    out["race"] = [each.end() for each in started]

    fresh()
    ancient = time.time() + 10 * 365 * 86400
    for path in Path("root", "compile_store").rglob("*"):
        os.utime(path, (ancient, ancient))
    out["a clock that was set back"] = [trial(VLLM_COMPILE_STORE_MAX_GB="1"), trial(VLLM_COMPILE_STORE_MAX_GB="1")]

    fresh()
    os.chmod("root/compile_store", 0o777)
    out["a store that others can write"] = [trial()]

    fresh()
    shutil.rmtree("root/compile_store/v1/blobs")
    out["blobs that are gone"] = [trial(), trial()]

    def deleted_while_serving():
        config = toys.config("root")
        model = toys.build(toys.Plain, config)
        first = toys.off(model)
        shutil.rmtree("root/compile_store")
        return [first, toys.off(model), toys.off(toys.build(toys.Head, config))]
    fresh()
    out["deleted"] = forks.run(deleted_while_serving)

    def fill(disk, free):
        handle = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        try:
            while os.write(handle, bytes(4096)):
                pass
        except OSError:
            pass
        os.ftruncate(handle, max(0, os.fstat(handle).st_size - free * 1024))
        os.close(handle)

    if len(sys.argv) > 1:
        disk = Path(sys.argv[1])
        os.environ["VLLM_COMPILE_STORE"] = str(disk / "store")
        out["a full disk"] = []
        for free in (0, 8, 40, 90) if FULL else (0, 40):  # KiB
            shutil.rmtree(disk / "store", ignore_errors=True)
            fill(disk, free)
            out["a full disk"].append(trial("elsewhere"))
        (disk / "filler").unlink()
        out["room again"] = [trial("elsewhere"), trial("elsewhere")]
        os.system(f"mount -o remount,ro {disk}")
        out["a read-only disk"] = [trial("elsewhere")]
        shutil.rmtree("elsewhere", ignore_errors=True)
        os.environ["VLLM_COMPILE_STORE"] = str(disk / "none")
        out["a read-only disk"].append(trial("elsewhere"))
        # All of vLLM's cache root: stock ends with an error here.
        del os.environ["VLLM_COMPILE_STORE"]
        out["a read-only disk"].append(trial(str(disk / "root")))
        os.system(f"mount -o remount,rw {disk}")
    report(out)
"""
)


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | None]:
    """A file system of 512 KiB, or None where mounting is not allowed."""
    folder = tmp_path_factory.mktemp("disk")
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "none", folder], capture_output=True)
    yield folder if mounted.returncode == 0 else None
    if mounted.returncode == 0:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.fixture(scope="module")
def toy(disk: Path | None, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = process.run(TOYS, *([str(disk)] if disk else []), folder=tmp_path_factory.mktemp("toys"), fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


COLD, WARM, NOT_KEPT = [0, 3, 1], [1, 0, 0], [0, 3, 0]  # loaded, compiled, kept


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        ("nothing", [COLD, WARM]),
        ("a clock that was set back", [WARM, WARM]),
        ("a store that others can write", [NOT_KEPT]),
        ("blobs that are gone", [COLD, WARM]),
        ("a full disk", [NOT_KEPT] * (4 if FULL else 2)),
        ("a read-only disk", [WARM, NOT_KEPT, NOT_KEPT]),
    ],
)
def test_what_is_loaded_and_kept(toy: dict[str, Any], fault: str, expected: list[list[int]]) -> None:
    if fault not in toy:
        pytest.skip("mounting is not allowed here")
    assert [trial.counts() for trial in toy[fault]] == expected


def test_what_is_said(toy: dict[str, Any]) -> None:
    assert [trial.warnings() for trial in toy["nothing"]] == [[], []]
    assert any("chmod" in line for line in toy["a store that others can write"][0].warnings())
    assert all(len(trial.warnings()) == 1 for trial in toy.get("a full disk", [])), "it is said, and not at length"


def test_a_disk_that_has_room_again(toy: dict[str, Any]) -> None:
    if "room again" not in toy:
        pytest.skip("mounting is not allowed here")
    first, second = (trial.counts() for trial in toy["room again"])
    assert (first[0], first[2]) == (0, 1)
    assert second == WARM


def test_every_blob_damaged(toy: dict[str, Any]) -> None:
    """Each alone: the start says so, compiles what needs that blob, and the next one loads again."""
    assert len(toy["blobs"]) >= 10
    for damaged, after in toy["blobs"]:
        loaded, compiled, _ = damaged.counts()
        assert loaded == 0
        assert compiled <= 2, "two pieces have one kernel in common"
        assert any("compiling again" in line for line in damaged.warnings())
        assert (after.counts(), after.warnings()) == (WARM, [])
    compiled_any = sum(damaged.counts()[1] > 0 for damaged, _ in toy["blobs"])
    assert compiled_any >= len(toy["blobs"]) - (16 if FULL else 4), "all but bytecode, plan and head"


@pytest.mark.parametrize("damage", ["truncate", "flip", "symlink", "folder", "newer"])
def test_every_manifest_damaged(toy: dict[str, Any], damage: str) -> None:
    trial = toy["manifests"][damage]
    assert trial.counts()[:2] == [0, 3]
    lines = 4 + (damage == "folder")
    assert len(trial.warnings()) == lines, "a line for each manifest, and one where it cannot be replaced"


def test_cold_starts_at_once(toy: dict[str, Any]) -> None:
    loaded, compiled, _ = map(sum, zip(*(trial.counts() for trial in toy["race"]), strict=True))
    assert compiled == 3, "each piece is compiled once"
    assert loaded == len(toy["race"]) - 1, "all but one have waited and loaded"


def test_deleted_while_serving(toy: dict[str, Any]) -> None:
    assert toy["deleted"].value == pytest.approx([0] * 3, abs=1e-5), toy["deleted"].output


ENGINES = (
    COMMON
    + f"""
    from vllm import LLM, SamplingParams
    from vllm.compilation.counter import compilation_counter as counter
    from vllm_compile_ext.store.store import Store

    def start(root, **env):
        def function():
            os.environ.update(env, VLLM_CACHE_ROOT=str(Path(root).absolute()))
            llm = LLM(model=sys.argv[1], dtype="float32", disable_log_stats=True, **{engine.LIMITS})
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            tokens = [list(o.outputs[0].token_ids) for o in llm.generate({engine.PROMPTS}, params, use_tqdm=False)]
            return [tokens, counter.num_aot_artifacts_loaded, counter.num_inductor_compiles]
        return forks.Fork(function)

    began = time.monotonic()
    out = {{"cold": start("made").end()}}
    took = time.monotonic() - began

    fresh()
    for number, path in enumerate(blobs("root")):
        (truncate, flip, another, symlink)[number % 4](path)
    out["damaged"] = start("root").end()
    fresh()
    flip(blobs("root")[0])
    out["forced"] = start("root", VLLM_FORCE_AOT_LOAD="1").end()

    out["killed"], moments = [], random.Random(20)
    for trial in range(24 if FULL else 8):
        # Every fourth on what the last ones left, the others on an empty store.
        if len(out["killed"]) % 4:
            shutil.rmtree("killed", ignore_errors=True)
        victim = start("killed")
        time.sleep(moments.uniform(0.2, 0.95) * took)
        victim.kill()
        killed = victim.end()
        if killed.status == 0:  # too late: the machine has become faster
            took *= 0.6
            continue
        damaged = [str(each) for each in Store.open(Path("killed/compile_store")).verify()]
        out["killed"].append([killed.status, damaged, start("killed").end()])
        if len(out["killed"]) == (12 if FULL else 4):
            break
    out["after"] = start("killed").end()
    report(out)
"""
)


@pytest.fixture(scope="module")
def engines(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = process.run(ENGINES, str(llama2), folder=tmp_path_factory.mktemp("engines"), fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    tokens, loaded, compiled = outcome.value["cold"].value
    assert (loaded, compiled) == (0, 3)
    assert all(len(set(each)) > 5 for each in tokens), "greedy tokens must vary"
    return outcome.value | {"tokens": tokens}


def test_an_engine_with_all_blobs_damaged(engines: dict[str, Any]) -> None:
    assert engines["damaged"].value == [engines["tokens"], 0, 3], engines["damaged"].output
    assert engines["damaged"].warnings()


def test_forced_loading_makes_damage_an_error(engines: dict[str, Any]) -> None:
    assert engines["forced"].status == 1
    assert engines["forced"].lines("VLLM_FORCE_AOT_LOAD=1, but")


def test_writers_killed_at_random_moments(engines: dict[str, Any]) -> None:
    assert [status for status, _, _ in engines["killed"]] == [-9] * (12 if FULL else 4), "killed before they were done"
    for _, damaged, following in engines["killed"]:
        assert damaged == [], "what can be read is whole"
        assert following.status == 0, following.output[-3000:]
        assert following.value[0] == engines["tokens"]
        assert not following.warnings(), "nothing half-written was read"
    assert engines["after"].value == [engines["tokens"], 1, 0]
