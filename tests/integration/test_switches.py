"""vLLM's own switches of its compile cache, where the store is, and what cannot be copied or kept, with toy models."""

from __future__ import annotations

from typing import Any

import pytest

from tests import process

pytestmark = pytest.mark.engine

EDITED = """
import torch
from tests import toys

class Layer(toys.Layer):
    def forward(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        return super().forward(torch.FUNCTION(x), residual)

@toys.support_torch_compile
class Model(toys.Sum):
    kind = Layer
"""

CODE = """
    import os, shutil
    from pathlib import Path
    import msgspec
    from tests import forks, toys
    from vllm_compile_ext.compilation import once
    from vllm_compile_ext.compilation.start import Entry
    from vllm_compile_ext.key import factors
    from vllm_compile_ext.program import NotKept, piece as pieces
    from vllm_compile_ext.store import bundle
    from vllm_compile_ext.store.store import Store
    from vllm_compile_ext.trace.tracer import Tracer

    out = {"files": {}}

    def start(name, root, *args, files=False, **env):
        out.setdefault(name, []).append(toys.start(root, *args, **env).end())
        if files:
            out["files"][name] = sorted(str(p.relative_to(root)) for p in Path(root).rglob("*") if p.is_file())

    def run(name, function):
        out.setdefault(name, []).append(forks.run(function))

    def replace(owner, name, value):
        return lambda: setattr(owner, name, value)

    # The cache_dir is where files for people go; it is not in the key.
    start("forced, empty", "root", VLLM_FORCE_AOT_LOAD="1")
    start("cold", "root", toys.Plain, {"cache_dir": "mine"})
    out["files"]["cache_dir"] = [str(p) for p in Path("mine").rglob("*")]
    start("forced", "root", VLLM_FORCE_AOT_LOAD="1")
    start("forced, other", "root", toys.Plain, {"compile_sizes": [4]}, VLLM_FORCE_AOT_LOAD="1")
    sys.dont_write_bytecode = True  # whose files have times in seconds
    def edited():
        import edited
        return edited.Model()
    for function in ("sin", "sin", "cos"):
        Path("edited.py").write_text(sys.argv[1].replace("FUNCTION", function))
        start("edited", "of edited", edited)

    for root in ("root", "disabled"):
        start("disabled", root, files=True, VLLM_DISABLE_COMPILE_CACHE="1")

    def torchs():
        import torch
        torch._inductor.config.force_disable_caches = True
        asked = []
        Entry.__init__ = lambda *args: asked.append(1)
        error = toys.error(lambda: toys.build(toys.Plain, toys.config("root"))(toys.tokens()))
        return [error, asked]
    run("torch's", torchs)

    def older():
        import depyf
        decompiled, real = [], depyf.decompile
        depyf.decompile = lambda code: decompiled.append(code.co_name) or real(code)
        model = toys.build(toys.Plain, toys.config("older"))
        with toys.counted() as counts:
            off = toys.off(model)
        return [off, counts["num_cache_entries_updated"], decompiled]
    os.environ["VLLM_USE_AOT_COMPILE"] = "0"
    os.environ["VLLM_COMPILE_DEPYF"] = "1"
    run("older", older)
    del os.environ["VLLM_COMPILE_DEPYF"]
    (transformed,) = Path("older").rglob("transformed_code.py")
    out["transformed"] = transformed.read_text()
    index = transformed.with_name("vllm_compile_cache.py")
    text, piece = index.read_text(), sorted(index.parent.glob("artifact_*"))[0]
    out["older files"] = [str(index.absolute()), piece.name, [str(p) for p in Path("older").rglob("manifests")]]
    index.write_text(text[: len(text) // 2])
    run("older", older)
    index.write_text(text)
    shutil.rmtree(piece) if piece.is_dir() else piece.write_bytes(piece.read_bytes()[:100])
    run("older", older)
    del os.environ["VLLM_USE_AOT_COMPILE"]

    # The index of upstream's pieces in the user's folder numbers them differently.
    start("upstream's index", "index 0", toys.Plain, {"cache_dir": "index"}, VLLM_USE_AOT_COMPILE="0")
    start("upstream's index", "index 1", toys.Plain, {"cache_dir": "index"})

    for _ in range(2):
        start("no-mega", "no-mega", VLLM_USE_MEGA_AOT_ARTIFACT="0")

    elsewhere = {"VLLM_COMPILE_STORE": str(Path("store").absolute())}
    start("elsewhere", "a", files=True, **elsewhere)
    start("elsewhere", "b", **elsewhere)
    bundle.pack(Store.open(Path("store")), Path("all.bundle"))
    bundle.unpack(Store.open(Path("unpacked")), Path("all.bundle"), allow_unsigned=True)
    start("unpacked", "c", VLLM_COMPILE_STORE=str(Path("unpacked").absolute()))

    def fail(*args):
        raise ImportError("cannot map")
    start("pieces that cannot be mapped", "d", toys.Plain, {}, replace(pieces, "_map", fail), **elsewhere)

    old = Store.open(Path("store"))
    for found in list(old.manifests()):
        if found.kind == "program":
            members = {"aot": found.members["plan"], "inductor/x.so": found.members["head"]}
            old.commit(msgspec.structs.replace(found, members=members))
    for _ in range(2):
        start("an older form", "a", **elsewhere)

    def eager():
        asked, real = [], Entry.__init__
        Entry.__init__ = lambda *args: asked.append(1) or real(*args)
        config = toys.config("eager")
        config.compilation_config.backend = "eager"  # CPU's platform makes it inductor
        model = toys.build(toys.Plain, config)
        return [[toys.off(model) for _ in range(3)], asked]
    run("eager", eager)

    start("no key", "e", toys.Plain, {}, replace(factors, "factors", lambda *args: 1 / 0))

    def two_instances():
        config = toys.config("theirs")
        with toys.upstream(), toys.counted() as counts:
            first, second = toys.build(toys.Plain, config), toys.build(toys.Plain, config)
            second.layers[3].up.weight.neg_()
            off = max(toys.off(first), toys.off(second), toys.off(first))
        return [off, *(counts[name] for name in toys.COUNTS)]
    for _ in range(2):
        run("two instances", two_instances)
    out["files"]["two instances"] = [str(p.relative_to("theirs")) for p in Path("theirs").rglob("*") if p.is_file()]

    for _ in range(2):
        start("given up", "given-up", toys.Plain, {}, replace(Tracer, "on_call", lambda *args: 1 / 0), files=True)
        start("refuted", "refuted", toys.Plain, {}, replace(once, "difference", lambda *graphs: "relu / sin"))
        start("a constant", "constant", toys.Constant)
        start("not kept by stock", "not-by-stock", toys.NotKeptByStock)
        give_up = replace(Tracer, "on_call", lambda *args: 1 / 0)
        start("not kept by stock, given up", "not-by-stock-given-up", toys.NotKeptByStock, {}, give_up)
        for count in (1, 2):
            start(f"layers: {count}", f"few-{count}", toys.Few, {}, replace(toys.Few, "count", count))

    def refuse(*args):
        raise NotKept("a test does not want it")
    start("not frozen", "not-frozen", toys.Plain, {}, replace(pieces, "freeze", refuse), files=True)
    report(out)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = process.run(CODE, EDITED, folder=tmp_path_factory.mktemp("switches"), fork=True)
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


# Of the starts in turn: models loaded, pieces compiled, models kept.
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cold", [[0, 3, 1]]),
        ("forced", [[1, 0, 0]]),
        ("edited", [[0, 3, 1], [1, 0, 0], [0, 2, 1]]),  # the last piece is what it was
        # vLLM turns AOT compilation off with it, and so the plugin's own path: each of the six pieces is compiled.
        ("disabled", [[0, 6, 0], [0, 6, 0]]),
        ("upstream's index", [[0, 6, 0], [0, 3, 1]]),
        # With the store elsewhere, the cache root does not matter.
        ("elsewhere", [[0, 3, 1], [1, 0, 0]]),
        ("unpacked", [[1, 0, 0]]),
        ("an older form", [[0, 0, 1], [1, 0, 0]]),
        # On vLLM's own path it keeps one artifact for a class: the second instance loads it beside the first.
        ("two instances", [[1, 6, 1], [2, 0, 0]]),
        ("given up", [[0, 6, 1], [1, 0, 0]]),
        ("refuted", [[0, 6, 1], [1, 0, 0]]),
        ("not kept by stock", [[0, 3, 1], [1, 0, 0]]),
        ("not kept by stock, given up", [[0, 6, 0], [0, 6, 0]]),
        ("a constant", [[0, 3, 1], [1, 0, 0]]),
        ("no key", [[0, 3, 0]]),
        ("not frozen", [[0, 3, 0]]),
        ("pieces that cannot be mapped", [[0, 3, 1]]),
        ("layers: 1", [[0, 2, 1], [1, 0, 0]]),
        ("layers: 2", [[0, 3, 1], [1, 0, 0]]),
    ],
)
def test_what_is_loaded_compiled_and_kept(ran: dict[str, Any], name: str, expected: list[list[int]]) -> None:
    assert [ended.counts() for ended in ran[name]] == expected


# Of a start, how many lines there are with some words.
@pytest.mark.parametrize(
    ("name", "number", "count", "words"),
    [
        ("edited", 2, 1, ["cache miss: Layer.forward has other code"]),
        ("layers: 1", 0, 1, ["traced 0 layers and copied 0"]),
        ("layers: 2", 0, 1, ["traced 0 layers and copied 0"]),
        ("given up", 0, 1, ["INFO", "every layer is traced, as in stock vLLM", "ZeroDivisionError"]),
        ("given up", 0, 1, ["cache miss"]),
        ("given up", 1, 0, ["cache miss"]),
        # The net under the proof: every layer is traced then, and the result is kept like any other.
        ("refuted", 0, 1, ["WARNING", "every layer is traced: a copied one is not what tracing gives, relu / sin"]),
        ("no key", 0, 1, ["nothing is loaded or kept: no key (ZeroDivisionError"]),
        ("not frozen", 0, 1, ["not kept"]),
        ("not frozen", 0, 1, ["not kept, the next start compiles again: piece 0 of 3: a test does not want it"]),
        ("pieces that cannot be mapped", 0, 1, ["compiling again: ImportError in "]),
        ("pieces that cannot be mapped", 0, 3, ["compiling one piece again: ImportError in "]),
    ],
)
def test_what_is_said(ran: dict[str, Any], name: str, number: int, count: int, words: list[str]) -> None:
    assert len(ran[name][number].lines(*words)) == count


@pytest.mark.parametrize(
    ("name", "why"), [("forced, empty", "nothing is stored yet"), ("forced, other", "config.compilation.compile_sizes")]
)
def test_a_forced_load_that_misses_is_an_error(ran: dict[str, Any], name: str, why: str) -> None:
    (ended,) = ran[name]
    assert ended.status == 1
    assert f"VLLM_FORCE_AOT_LOAD=1, but cache miss: {why}" in ended.output


def test_torchs_own_switch(ran: dict[str, Any]) -> None:
    """The store is not asked; then torch refuses to compile ahead of time, as it does in stock vLLM."""
    (ended,) = ran["torch's"]
    assert ended.status == 0, ended.output[-3000:]
    (kind, message), asked = ended.value
    assert kind == "RuntimeError"
    assert "force_disable_caches=True" in message
    assert asked == []


def test_the_older_cache(ran: dict[str, Any]) -> None:
    """``VLLM_USE_AOT_COMPILE=0``: Dynamo's bytecode hook and upstream's index of pieces; damage is mended."""
    index, piece, manifests = ran["older files"]
    for ended, damaged in zip(ran["older"], ("", index, piece), strict=True):
        assert ended.status == 0, ended.output[-3000:]
        off, _, decompiled = ended.value
        assert off <= 1e-5
        assert decompiled == ([] if damaged else ["forward"])
        assert bool(ended.lines("WARNING", "compiling again", damaged)) == bool(damaged)
    assert ran["older"][0].value[1] > 0, "pieces are in the index"
    assert "def forward" in ran["transformed"]
    assert manifests == []


def test_without_the_bundled_artifact(ran: dict[str, Any]) -> None:
    cold, warm = (ended.counts() for ended in ran["no-mega"])
    assert (cold[2], warm[0]) == (1, 1)


def test_files_for_people_are_in_the_users_cache_dir(ran: dict[str, Any]) -> None:
    assert any(name.endswith("computation_graph.py") for name in ran["files"]["cache_dir"])


@pytest.mark.parametrize("name", ["elsewhere", "disabled"])
def test_with_the_store_elsewhere_or_off_nothing_is_in_the_cache_root(ran: dict[str, Any], name: str) -> None:
    assert not [file for file in ran["files"][name] if "compile_store" in file]


@pytest.mark.parametrize("name", ["two instances", "given up", "not frozen"])
def test_what_is_not_the_plugins_own_is_not_in_its_store(ran: dict[str, Any], name: str) -> None:
    files = ran["files"][name]
    assert not [file for file in files if "compile_store/v1/manifests" in file]
    if name != "not frozen":
        assert any(file.startswith("torch_compile_cache") and file.endswith("/model") for file in files)


def test_the_eager_backend_has_no_part_in_it(ran: dict[str, Any]) -> None:
    """Upstream looks for an artifact at each call then."""
    (ended,) = ran["eager"]
    assert ended.value == [[pytest.approx(0, abs=1e-5)] * 3, []], ended.output[-3000:]
