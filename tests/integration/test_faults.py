"""The store under faults.  Each trial ends with an engine that serves, or a model that runs, and the right answer.

A trial is a start: a fork of a process that has vLLM imported (`tests/forks.py`).  Engines are real ones; where there
are many trials, a toy model stands in, judged by itself in eager mode.
"""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import process

pytestmark = pytest.mark.engine

COMMON = """
    import os, random, shutil, time
    from pathlib import Path
    from vllm_compile_ext import plugin
    plugin.register()
    from tests import forks
    forks.prepare()
    from vllm.compilation.counter import compilation_counter as counter
    from vllm_compile_ext.store.store import Store

    def blobs(root):
        return sorted(Path(root, "compile_store").glob("v1/blobs/*/*"))

    def manifests(root):
        return sorted(Path(root, "compile_store").glob("v1/manifests/*/*.json"))

    def truncate(path):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    def flip(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)

    def another(path):  # a longer blob, cut, so that the size is right
        longer = max(blobs(path.parents[4]), key=lambda p: (p != path) * p.stat().st_size)
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

    def fresh(root):  # a copy of what the first cold start left
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree("made", root)

    def told(ended):
        return [line for line in ended.lines("WARNING") if "compil" in line or "store" in line]
"""

TOYS = (
    COMMON
    + """
    from tests import toys

    def start(root, kind=toys.Plain, **env):
        def function():
            os.environ.update(env)
            model = toys.build(kind, toys.config(root))
            off = toys.off(model)
            compiled, saved = counter.num_inductor_compiles, counter.num_aot_artifacts_saved
            return [off, counter.num_aot_artifacts_loaded, compiled, saved]
        return forks.Fork(function)

    def result(ended):
        return [ended.status, ended.value, told(ended)]

    def trial(root, **env):
        return result(start(root, **env).end())

    def pairs(prepared):  # two starts at a time
        results = []
        for first in range(0, len(prepared), 2):
            started = []
            for number, (victims, damage) in enumerate(prepared[first : first + 2]):
                fresh(f"root{number}")
                for path in victims(f"root{number}"):
                    damage(path)
                started.append(start(f"root{number}"))
            results += [result(one.end()) for one in started]
        return results

    out = {"cold": trial("made"), "warm": trial("made")}
    count = len(blobs("made"))
    for damage in (truncate, flip, another, symlink):
        one = lambda number: lambda root: [blobs(root)[number]]
        out[damage.__name__] = pairs([(one(number), damage) for number in range(count)])
        out[f"after {damage.__name__}"] = trial("root0")
    damages = (truncate, flip, symlink, folder, newer)
    for damage, found in zip(damages, pairs([(manifests, damage) for damage in damages])):
        out[f"manifests {damage.__name__}"] = found

    started = [start("race") for _ in range(8)]
    out["race"] = [[e.status, e.value] for e in (s.end() for s in started)]

    fresh("root")
    ancient = time.time() + 10 * 365 * 86400
    for path in Path("root", "compile_store").rglob("*"):
        os.utime(path, (ancient, ancient))
    out["clock"] = [trial("root", VLLM_COMPILE_STORE_MAX_GB="1"), trial("root", VLLM_COMPILE_STORE_MAX_GB="1")]

    fresh("root")
    os.chmod("root/compile_store", 0o777)
    out["open to others"] = trial("root")

    fresh("root")
    shutil.rmtree("root/compile_store/v1/blobs")
    out["no blobs"] = [trial("root"), trial("root")]

    def deleted_while_serving():
        config = toys.config("root")
        model = toys.build(toys.Plain, config)
        first = toys.off(model)
        shutil.rmtree("root/compile_store")
        other = toys.build(toys.Head, config)
        return [first, toys.off(model), toys.off(other), counter.num_aot_artifacts_saved]
    fresh("root")
    ended = forks.run(deleted_while_serving)
    out["deleted"] = [ended.status, ended.value, told(ended)]

    def fill(disk, free):
        handle = os.open(disk / "filler", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
        try:
            while os.write(handle, bytes(4096)):
                pass
        except OSError:
            pass
        os.ftruncate(handle, max(0, os.fstat(handle).st_size - free * 1024))
        os.close(handle)

    disk = Path(sys.argv[1]) if len(sys.argv) > 1 else None
    if disk is not None:
        os.environ["VLLM_COMPILE_STORE"] = str(disk / "store")
        out["filled"] = []
        for free in (0, 8, 40, 90):  # KiB
            shutil.rmtree(disk / "store", ignore_errors=True)
            fill(disk, free)
            out["filled"].append(trial("elsewhere"))
        (disk / "filler").unlink()
        out["room again"] = [trial("elsewhere"), trial("elsewhere")]
        os.system(f"mount -o remount,ro {disk}")
        out["read-only"] = trial("elsewhere")
        shutil.rmtree("elsewhere", ignore_errors=True)
        os.environ["VLLM_COMPILE_STORE"] = str(disk / "none")
        out["read-only, empty"] = trial("elsewhere")
        # All of vLLM's cache root: stock ends with an error here.
        del os.environ["VLLM_COMPILE_STORE"]
        out["read-only root"] = trial(str(disk / "root"))
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
    outcome = process.run(TOYS, *([str(disk)] if disk else []), folder=tmp_path_factory.mktemp("toys"))
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


def right(trial: list[Any]) -> None:
    status, value, _ = trial
    assert status == 0
    assert value[0] == pytest.approx(0, abs=1e-5)


def test_the_judge(toy: dict[str, Any]) -> None:
    right(toy["cold"])
    right(toy["warm"])
    assert toy["cold"][1][1:] == [0, 3, 1]
    assert toy["warm"][1][1:] == [1, 0, 0]
    assert toy["cold"][2] == toy["warm"][2] == []


@pytest.mark.parametrize("damage", ["truncate", "flip", "another", "symlink"])
def test_every_blob_damaged(toy: dict[str, Any], damage: str) -> None:
    """Each alone: the start says so, compiles what needs that blob, and the next one loads again."""
    assert len(toy[damage]) >= 10
    for trial in toy[damage]:
        right(trial)
        assert trial[1][1] == 0
        assert trial[1][2] <= 2, "two pieces have one kernel in common"
        assert any("compiling again" in line for line in trial[2])
    assert sum(trial[1][2] for trial in toy[damage]) >= len(toy[damage]) - 3, "all but bytecode, plan and head"
    right(toy[f"after {damage}"])
    assert toy[f"after {damage}"][1:] == [[pytest.approx(0, abs=1e-5), 1, 0, 0], []]


@pytest.mark.parametrize("damage", ["truncate", "flip", "symlink", "folder", "newer"])
def test_every_manifest_damaged(toy: dict[str, Any], damage: str) -> None:
    trial = toy[f"manifests {damage}"]
    right(trial)
    assert trial[1][1:3] == [0, 3]
    assert len(trial[2]) == 4 + (damage == "folder"), "a line for each manifest, and one where it cannot be replaced"


def test_eight_cold_starts_at_once(toy: dict[str, Any]) -> None:
    trials = toy["race"]
    assert [status for status, _ in trials] == [0] * 8
    assert [value[0] for _, value in trials] == pytest.approx([0] * 8, abs=1e-5)
    assert sum(value[2] for _, value in trials) == 3, "each piece is compiled once"
    assert sum(value[1] for _, value in trials) == 7, "seven have waited and loaded"


def test_a_clock_that_was_set_back(toy: dict[str, Any]) -> None:
    for trial in toy["clock"]:
        right(trial)
        assert trial[1][1:] == [1, 0, 0]


def test_a_store_that_others_can_write(toy: dict[str, Any]) -> None:
    trial = toy["open to others"]
    right(trial)
    assert trial[1][1:] == [0, 3, 0]
    assert any("chmod" in line for line in trial[2])


def test_blobs_that_are_gone(toy: dict[str, Any]) -> None:
    first, second = toy["no blobs"]
    right(first)
    right(second)
    assert first[1][1:] == [0, 3, 1]
    assert second[1][1:] == [1, 0, 0]


def test_deleted_while_serving(toy: dict[str, Any]) -> None:
    status, value, _ = toy["deleted"]
    assert status == 0
    assert value[:3] == pytest.approx([0] * 3, abs=1e-5)


def test_a_full_disk(toy: dict[str, Any]) -> None:
    if "filled" not in toy:
        pytest.skip("mounting is not allowed here")
    for trial in toy["filled"]:
        right(trial)
        assert trial[1][1:] == [0, 3, 0]
        assert len(trial[2]) == 1, "it is said, and not at length"
    first, second = toy["room again"]
    right(first)
    right(second)
    assert (first[1][1], first[1][3]) == (0, 1)
    assert second[1][1:] == [1, 0, 0]


def test_a_read_only_store(toy: dict[str, Any]) -> None:
    if "read-only" not in toy:
        pytest.skip("mounting is not allowed here")
    right(toy["read-only"])
    assert toy["read-only"][1][1:] == [1, 0, 0]
    for name in ("read-only, empty", "read-only root"):
        right(toy[name])
        assert toy[name][1][1:] == [0, 3, 0]


ENGINES = (
    COMMON
    + """
    from vllm import LLM, SamplingParams
    model = sys.argv[1]
    PROMPTS = ("The import statement", "def f(x):", "x")

    def start(root, **env):
        def function():
            os.environ.update(env)
            os.environ["VLLM_CACHE_ROOT"] = str(Path(root).absolute())
            limits = dict(max_num_batched_tokens=256, max_model_len=256, gpu_memory_utilization=0.4)
            llm = LLM(model=model, dtype="float32", disable_log_stats=True, **limits)
            params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
            tokens = [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, params, use_tqdm=False)]
            return [tokens, counter.num_aot_artifacts_loaded, counter.num_inductor_compiles]
        return forks.Fork(function)

    def result(ended):
        return [ended.status, ended.value, told(ended)]

    began = time.monotonic()
    made, other = start("made"), start("other")
    out = {"cold": result(made.end()), "other": result(other.end())}
    took = time.monotonic() - began  # of two at a time, as all are
    out["warm"] = result(start("made").end())

    def damaged(damage):
        root = damage.__name__
        fresh(root)
        for path in blobs(root):
            damage(path)
        return start(root)
    for pair in ((truncate, flip), (another, symlink)):
        for damage, started in [(damage, damaged(damage)) for damage in pair]:
            out[damage.__name__] = result(started.end())
    fresh("root")
    flip(blobs("root")[0])
    ended = start("root", VLLM_FORCE_AOT_LOAD="1").end()
    out["forced"] = [ended.status, ended.lines("VLLM_FORCE_AOT_LOAD=1, but")]

    def kills(seed):
        def function():
            os.mkdir(f"kills{seed}")
            os.chdir(f"kills{seed}")
            moments, found, span = random.Random(seed), [], took
            for _ in range(12):
                # Every fourth on what the last ones left, the others on an empty store.
                if len(found) % 4:
                    shutil.rmtree("killed", ignore_errors=True)
                victim = start("killed")
                time.sleep(moments.uniform(0.2, 0.95) * span)
                victim.kill()
                killed = victim.end()
                if killed.status == 0:  # too late: the machine has become faster
                    span *= 0.6
                    continue
                damaged = [str(d) for d in Store.open(Path("killed/compile_store")).verify()]
                found.append([killed.status, damaged, result(start("killed").end())])
                if len(found) == 6:
                    break
            return [found, result(start("killed").end())]
        return forks.Fork(function)
    ended = [each.end() for each in (kills(20), kills(21))]
    out["kills"], out["after"] = ([each.value[n] for each in ended] for n in (0, 1))
    report(out)
"""
)


@pytest.fixture(scope="module")
def engines(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = process.run(ENGINES, str(llama2), folder=tmp_path_factory.mktemp("engines"))
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


@pytest.mark.parametrize("damage", ["truncate", "flip", "another", "symlink"])
def test_an_engine_with_all_blobs_damaged(engines: dict[str, Any], damage: str) -> None:
    status, value, lines = engines[damage]
    assert status == 0
    assert value == [engines["cold"][1][0], 0, 3]
    assert lines


def test_forced_loading_makes_damage_an_error(engines: dict[str, Any]) -> None:
    status, lines = engines["forced"]
    assert status == 1
    assert lines


def test_writers_killed_at_random_moments(engines: dict[str, Any]) -> None:
    tokens = engines["cold"][1][0]
    assert all(len(set(t)) > 5 for t in tokens), "greedy tokens must vary"
    assert engines["warm"][1] == [tokens, 1, 0]
    assert engines["other"][1] == engines["cold"][1]
    kills = [*engines["kills"][0], *engines["kills"][1]]
    assert [status for status, _, _ in kills] == [-9] * 12, "killed before they were done"
    for _, damaged, next_one in kills:
        assert damaged == [], "what can be read is whole"
        assert next_one[0] == 0
        assert next_one[1][0] == tokens
        assert not next_one[2], "nothing half-written was read"
    assert [value for _, value, _ in engines["after"]] == [[tokens, 1, 0]] * 2
