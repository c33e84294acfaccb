"""vLLM's own switches of its compile cache, and where the store is, with toy models."""

from __future__ import annotations

from typing import Any

import pytest

from tests import process

pytestmark = pytest.mark.engine

CODE = """
    import os
    from pathlib import Path
    from vllm_compile_ext import plugin
    plugin.register()
    from tests import forks
    forks.prepare()
    from tests import toys
    from vllm.compilation.counter import compilation_counter as counter
    from vllm_compile_ext.store import bundle
    from vllm_compile_ext.store.store import Store

    def start(root, *, compilation={}, **env):
        def function():
            os.environ.update(env)
            model = toys.build(toys.Plain, toys.config(root, **compilation))
            off = toys.off(model)
            compiled, saved = counter.num_inductor_compiles, counter.num_aot_artifacts_saved
            return [off, counter.num_aot_artifacts_loaded, compiled, saved]
        ended = forks.run(function)
        return [ended.status, ended.value, ended.output]

    def files(root):
        return sorted(str(p.relative_to(root)) for p in Path(root).rglob("*") if p.is_file())

    out = {"files": {}}
    out["forced, empty"] = start("root", VLLM_FORCE_AOT_LOAD="1")
    out["disabled"] = start("off", VLLM_DISABLE_COMPILE_CACHE="1")
    out["files"]["disabled"] = files("off")
    out["cold"] = start("root")
    def torchs(root):
        def function():
            import torch
            torch._inductor.config.force_disable_caches = True
            from vllm_compile_ext.compilation import entry
            made = []
            entry.Entry.__init__ = lambda *args: made.append(1)
            model = toys.build(toys.Plain, toys.config(root))
            try:
                model(toys.tokens())
            except RuntimeError as error:
                return [str(error), made]
        ended = forks.run(function)
        return [ended.status, ended.value, ended.output]
    out["torch's"] = torchs("root")
    out["forced"] = start("root", VLLM_FORCE_AOT_LOAD="1")
    out["forced, other"] = start("root", compilation={"compile_sizes": [4]}, VLLM_FORCE_AOT_LOAD="1")
    out["disabled after"] = start("root", VLLM_DISABLE_COMPILE_CACHE="1")
    for name, env in (("no-aot", "VLLM_USE_AOT_COMPILE"), ("no-mega", "VLLM_USE_MEGA_AOT_ARTIFACT")):
        out[name] = [start(name, **{env: "0"}), start(name, **{env: "0"})]
        out["files"][name] = files(name)
    out["elsewhere"] = [start("a", VLLM_COMPILE_STORE=str(Path("store").absolute())) for _ in range(2)]
    out["files"]["elsewhere"] = files("a")
    out["other root"] = start("b", VLLM_COMPILE_STORE=str(Path("store").absolute()))
    bundle.pack(Store.open(Path("store")), Path("all.bundle"))
    bundle.unpack(Store.open(Path("unpacked")), Path("all.bundle"), allow_unsigned=True)
    out["unpacked"] = start("d", VLLM_COMPILE_STORE=str(Path("unpacked").absolute()))
    def eager():
        import time
        os.environ["VLLM_COMPILE_WAIT"] = "30"
        from vllm_compile_ext.compilation import entry
        made = []
        real = entry.Entry.__init__
        entry.Entry.__init__ = lambda *args: made.append(1) or real(*args)
        config = toys.config("eager")
        config.compilation_config.backend = "eager"  # CPU's platform makes it inductor
        model = toys.build(toys.Plain, config)
        return [[toys.off(model) for _ in range(3)], len(made)]
    ended = forks.run(eager)
    out["eager"] = [ended.status, ended.value, ended.output]

    def broken_pieces():
        from vllm_compile_ext.compilation import pieces
        def fail(*args):
            raise ImportError("cannot map")
        pieces._map = fail
        os.environ["VLLM_COMPILE_STORE"] = str(Path("store").absolute())
        return toys.off(toys.build(toys.Plain, toys.config("e")))
    ended = forks.run(broken_pieces)
    out["pieces that cannot be mapped"] = [ended.status, ended.value, ended.output]

    def no_key():
        from vllm_compile_ext.key import factors
        factors.factors = lambda *args: 1 / 0
        return [toys.off(toys.build(toys.Plain, toys.config("f"))), counter.num_aot_artifacts_saved]
    ended = forks.run(no_key)
    out["no key"] = [ended.status, ended.value, ended.output]
    def trial(function):
        ended = forks.run(function)
        return [ended.status, ended.value, ended.output]

    def two_instances():
        config = toys.config("theirs")
        with toys.upstream():
            first, second = toys.build(toys.Plain, config), toys.build(toys.Plain, config)
            second.layers[3].up.weight.neg_()
            off = max(toys.off(first), toys.off(second), toys.off(first))
        return [off, counter.num_aot_artifacts_loaded, counter.num_inductor_compiles, counter.num_aot_artifacts_saved]
    out["two instances"] = [trial(two_instances) for _ in range(2)]
    out["files"]["theirs"] = files("theirs")

    def given_up():
        from vllm_compile_ext.trace.tracer import Tracer
        Tracer.on_call = lambda *args: 1 / 0
        off = toys.off(toys.build(toys.Plain, toys.config("given-up")))
        counts = [counter.num_aot_artifacts_loaded, counter.num_inductor_compiles, counter.num_aot_artifacts_saved]
        return [off, *counts, "given-up/torch_compile_cache" in os.environ["TORCHINDUCTOR_CACHE_DIR"]]
    out["given up"] = [trial(given_up) for _ in range(2)]
    out["files"]["given up"] = files("given-up")

    def not_frozen():
        from vllm_compile_ext.compilation import pieces
        def refuse(*args):
            raise pieces.NotFrozen("a test does not want it")
        pieces.freeze = refuse
        return toys.off(toys.build(toys.Plain, toys.config("not-frozen")))
    out["not frozen"] = trial(not_frozen)
    out["files"]["not frozen"] = files("not-frozen")

    import msgspec
    old = Store.open(Path("store"))
    for found in list(old.manifests()):
        if found.kind == "program":
            members = {"aot": found.members["plan"], "inductor/x.so": found.members["head"]}
            old.commit(msgspec.structs.replace(found, members=members))
    out["an older form"] = [start("a", VLLM_COMPILE_STORE=str(Path("store").absolute())) for _ in range(2)]
    out["cache_dir"] = [start("c", compilation={"cache_dir": "mine"}), start("c", compilation={"cache_dir": "mine"})]
    out["files"]["cache_dir"] = files("mine")
    report(out)
"""


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    outcome = process.run(CODE, folder=tmp_path_factory.mktemp("switches"))
    assert outcome.code == 0, outcome.output[-5000:]
    return outcome.value


def good(trial: list[Any], loaded: int, compiled: int, saved: int) -> None:
    status, value, output = trial
    assert status == 0, output[-3000:]
    assert value[0] == pytest.approx(0, abs=1e-5)
    assert value[1:] == [loaded, compiled, saved]


def test_a_forced_load(ran: dict[str, Any]) -> None:
    """A miss is an error that says what differed."""
    status, _, output = ran["forced, empty"]
    assert status == 1
    assert "VLLM_FORCE_AOT_LOAD=1, but cache miss: nothing is stored yet" in output
    good(ran["forced"], 1, 0, 0)
    status, _, output = ran["forced, other"]
    assert status == 1
    assert "VLLM_FORCE_AOT_LOAD=1, but cache miss: config.compilation.compile_sizes" in output


def test_no_cache(ran: dict[str, Any]) -> None:
    """vLLM turns AOT compilation off with it, and so the plugin's own path: each of the six pieces is compiled."""
    good(ran["disabled"], 0, 6, 0)
    assert [name for name in ran["files"]["disabled"] if "compile_store" in name] == []
    good(ran["cold"], 0, 3, 1)
    good(ran["disabled after"], 0, 6, 0)


def test_torchs_own_switch(ran: dict[str, Any]) -> None:
    """The store is not asked; then torch refuses to compile ahead of time, as it does in stock vLLM."""
    status, value, output = ran["torch's"]
    assert status == 0, output[-3000:]
    message, made = value
    assert "force_disable_caches=True" in message
    assert made == []


def test_without_aot_compilation(ran: dict[str, Any]) -> None:
    """Upstream's older path and its own cache."""
    cold, warm = ran["no-aot"]
    good(cold, 0, 6, 0)
    assert warm[0] == 0
    assert warm[1][0] == pytest.approx(0, abs=1e-5)
    assert not [name for name in ran["files"]["no-aot"] if "manifests" in name]


def test_without_the_bundled_artifact(ran: dict[str, Any]) -> None:
    cold, warm = ran["no-mega"]
    for status, value, output in (cold, warm):
        assert status == 0, output[-3000:]
        assert value[0] == pytest.approx(0, abs=1e-5)
    assert cold[1][3] == 1
    assert warm[1][1] == 1


def test_two_instances_on_vllms_own_path(ran: dict[str, Any]) -> None:
    """vLLM keeps one artifact for a class: the second instance loads it beside the first."""
    cold, warm = ran["two instances"]
    good(cold, 1, 6, 1)
    good(warm, 2, 0, 0)
    kept = ran["files"]["theirs"]
    assert any(name.startswith("torch_compile_cache") and name.endswith("/model") for name in kept)
    assert not [name for name in kept if "compile_store" in name]


def test_what_trace_once_gave_up_on_is_kept_as_vllm_keeps_it(ran: dict[str, Any]) -> None:
    """Its files of Inductor lie in vLLM's own folder, too: what vLLM keeps names them."""
    for (status, value, output), counts in zip(ran["given up"], ([0, 6, 1], [1, 0, 0]), strict=True):
        assert status == 0, output[-3000:]
        assert value == [pytest.approx(0, abs=1e-5), *counts, True]
        assert ("cache miss" in output) == (counts[0] == 0)
    assert not [name for name in ran["files"]["given up"] if "compile_store/v1/manifests" in name]


def test_a_model_with_a_piece_that_cannot_be_kept(ran: dict[str, Any]) -> None:
    status, value, output = ran["not frozen"]
    assert status == 0, output[-3000:]
    assert value == pytest.approx(0, abs=1e-5)
    lines = [line for line in output.splitlines() if "not kept" in line]
    assert len(lines) == 1
    assert "not kept, the next start compiles again: piece 0 of 3: a test does not want it" in lines[0]
    assert not [name for name in ran["files"]["not frozen"] if "compile_store/v1/manifests" in name]


def test_an_entry_of_a_form_that_is_gone(ran: dict[str, Any]) -> None:
    first, second = ran["an older form"]
    good(first, 0, 0, 1)
    good(second, 1, 0, 0)


def test_where_the_store_is(ran: dict[str, Any]) -> None:
    cold, warm = ran["elsewhere"]
    good(cold, 0, 3, 1)
    good(warm, 1, 0, 0)
    assert not [name for name in ran["files"]["elsewhere"] if "blobs" in name]
    good(ran["other root"], 1, 0, 0)


def test_a_bundle_is_loaded(ran: dict[str, Any]) -> None:
    good(ran["unpacked"], 1, 0, 0)


def test_the_eager_backend_has_no_part_in_it(ran: dict[str, Any]) -> None:
    """Upstream looks for an artifact at each call then."""
    status, value, output = ran["eager"]
    assert status == 0, output[-3000:]
    assert value == [[pytest.approx(0, abs=1e-5)] * 3, 0]


def test_pieces_that_cannot_be_mapped_are_compiled(ran: dict[str, Any]) -> None:
    status, value, output = ran["pieces that cannot be mapped"]
    assert status == 0, output[-3000:]
    assert value == pytest.approx(0, abs=1e-5)
    assert "compiling again: ImportError in " in output
    assert output.count("compiling one piece again: ImportError in ") == 3


def test_without_a_key_nothing_is_kept(ran: dict[str, Any]) -> None:
    status, value, output = ran["no key"]
    assert status == 0, output[-3000:]
    assert value == [pytest.approx(0, abs=1e-5), 0]
    assert "nothing is loaded or kept: no key (ZeroDivisionError" in output


def test_a_cache_dir_of_the_users_own(ran: dict[str, Any]) -> None:
    """It is where the files for people go; it is not in the key."""
    cold, warm = ran["cache_dir"]
    good(cold, 0, 3, 1)
    good(warm, 1, 0, 0)
    assert any(name.endswith("computation_graph.py") for name in ran["files"]["cache_dir"])
