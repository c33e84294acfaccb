"""The plugin in a process with the installed vLLM, no engine started."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.process import ROOT, Outcome, run, together

LOOK = """
    import sys, pickle, inspect, traceback
    import vllm
    import vllm.engine.arg_utils  # what a front end has imported when it loads plugins
    from vllm.plugins import load_general_plugins
    before = {m for m in sys.modules if m.split('.')[0] == 'torch'}
    load_general_plugins()
    new_torch = sorted({m for m in sys.modules if m.split('.')[0] == 'torch'} - before)
    from vllm_compile_ext import plugin
    first = plugin.status()
    plugin.register()
    import vllm.compilation.backends as backends
    import vllm.compilation.wrapper as wrapper
    import vllm.compilation.counter as counter
    from vllm_compile_ext import upstream
    import vllm_compile_ext.compilation.wrapper as ours
    import vllm.envs
    cls = wrapper.TorchCompileWithNoGuardsWrapper
    try:
        backends.CompilerManager.load(None, None, None, None, None)
    except Exception:
        trace = traceback.format_exc()
    status = plugin.status()
    prefixes = ('VLLM_COMPILE_EXT', 'VLLM_COMPILE_DEPYF')
    report(dict(
        active=status.active, line=status.line, same=first is status, new_torch=new_torch,
        backends=backends.__file__, names=[backends.__name__, backends.__spec__.name],
        one_object=sys.modules['vllm.compilation.wrapper'] is sys.modules.get('vllm_compile_ext.compilation.wrapper'),
        upstream_file=upstream.backends.__file__, shared_counter=upstream.counter is counter,
        source=inspect.getsource(cls), source_file=inspect.getsourcefile(cls),
        pickled=pickle.loads(pickle.dumps(cls)) is cls, trace=trace,
        known=sorted(v for v in vllm.envs.environment_variables if v.startswith(prefixes)),
        key=vllm.envs.compile_factors(),
        model_tag=[backends.model_tag, upstream.backends.model_tag],
    ))
"""


FACTORS = "import vllm.envs, vllm.plugins; vllm.plugins.load_general_plugins(); report(vllm.envs.compile_factors())"


@pytest.fixture(scope="module")
def looks() -> list[Outcome]:
    return together(
        partial(run, LOOK), partial(run, LOOK, VLLM_COMPILE_EXT="0"), partial(run, FACTORS, VLLM_PLUGINS="")
    )


@pytest.fixture(scope="module")
def active(looks: list[Outcome]) -> Outcome:
    return looks[0]


@pytest.fixture(scope="module")
def off(looks: list[Outcome]) -> Outcome:
    return looks[1]


@pytest.fixture(scope="module")
def absent(looks: list[Outcome]) -> Any:
    """vLLM's cache key factors where the plugin is kept out altogether."""
    return looks[2].value


def test_active_and_says_so(active: Outcome) -> None:
    assert active.value["active"]
    assert "is active" in active.value["line"]
    assert active.value["same"], "register is idempotent"


def test_loading_imports_nothing_of_torch(active: Outcome) -> None:
    assert active.value["new_torch"] == []


def test_vllm_gets_our_module_under_its_name(active: Outcome) -> None:
    assert active.value["backends"].endswith("vllm_compile_ext/compilation/backends.py")
    assert active.value["names"] == ["vllm_compile_ext.compilation.backends"] * 2
    assert active.value["one_object"]


def test_upstream_stays_importable_and_shares_state(active: Outcome) -> None:
    assert active.value["upstream_file"].endswith("/vllm/compilation/backends.py")
    assert active.value["shared_counter"]
    assert active.value["model_tag"] == ["backbone", "backbone"]


def test_tools_see_our_source(active: Outcome) -> None:
    assert "def bytecode_hook" in active.value["source"]
    assert active.value["source_file"].endswith("vllm_compile_ext/compilation/wrapper.py")
    assert active.value["pickled"]
    assert "vllm_compile_ext/compilation/backends.py" in active.value["trace"]


def test_variables_are_known_and_out_of_the_key(active: Outcome, off: Outcome, absent: Any) -> None:
    names = ["VLLM_COMPILE_DEPYF", "VLLM_COMPILE_EXT", "VLLM_COMPILE_EXT_STRICT"]
    assert active.value["known"] == names
    assert off.value["known"] == names
    assert not [name for name in active.value["key"] if name in names]
    # Only the plugin's own version tells our entries from stock's.
    assert set(active.value["key"]) - set(absent) == {"vllm_compile_ext"}


def test_kill_switch_is_stock(off: Outcome, absent: Any) -> None:
    assert not off.value["active"]
    assert "VLLM_COMPILE_EXT=0" in off.value["line"]
    assert off.value["backends"].endswith("/vllm/compilation/backends.py")
    assert "/vllm/compilation/backends.py" in off.value["trace"]
    assert {k: v for k, v in off.value["key"].items() if k != "VLLM_PLUGINS"} == {
        k: v for k, v in absent.items() if k != "VLLM_PLUGINS"
    }


GIVE_UP = """
    import sys, os
    import vllm.engine.arg_utils
    from vllm_compile_ext import changes, plugin, versions
    {before}
    from vllm.config.logging import LoggingConfig
    import vllm.logger
    vllm.logger.configure_logging(LoggingConfig())
    os.environ["VLLM_COMPILE_EXT_STRICT"] = "1"
    error = None
    try:
        plugin.register()
    except plugin.PluginError as e:
        error = str(e)
    del os.environ["VLLM_COMPILE_EXT_STRICT"]
    plugin.register()
    plugin.register()
    import vllm.compilation.backends as backends
    from vllm.platforms import current_platform
    current_platform.validate_environ(False)
    report(dict(strict=error, backends=backends.__file__))
"""

# What is done before, the environment, what the line names, and its level.
REASONS: dict[str, tuple[str, dict[str, str], str, str]] = {
    "unsupported vLLM": ("versions.VLLM = '>=99'", {}, "vllm 0.32.0", "WARNING"),
    "imported too early": ("import vllm.compilation.decorators", {}, "vllm.compilation.decorators", "WARNING"),
    "bad value": ("", {"VLLM_COMPILE_DEPYF": "banana"}, "VLLM_COMPILE_DEPYF='banana'", "ERROR"),
    "surprise": (
        "make = changes.make; changes.make = lambda *kinds: make(*kinds) if changes.OFF in kinds else 1 / 0",
        {},
        "ZeroDivisionError",
        "WARNING",
    ),
}


@pytest.fixture(scope="module")
def given_up() -> list[Outcome]:
    return together(*(partial(run, GIVE_UP.format(before=before), **env) for before, env, *_ in REASONS.values()))


@pytest.mark.parametrize("reason", REASONS)
def test_whatever_is_wrong_vllm_is_stock_and_one_line_says_why(given_up: list[Outcome], reason: str) -> None:
    _, _, named, level = REASONS[reason]
    outcome = given_up[list(REASONS).index(reason)]
    assert outcome.value["backends"].endswith("/vllm/compilation/backends.py")
    (line,) = outcome.lines("vllm-compile-ext", "not active")
    assert level in line
    assert named in line
    assert not outcome.lines("Unknown vLLM environment variable", "VLLM_COMPILE_")
    assert named in outcome.value["strict"]
    assert "VLLM_COMPILE_EXT_STRICT=1" in outcome.value["strict"]


RECORD = """
    import os
    sys.orig_argv = [*sys.orig_argv, "vllm"]
    exec(open({pth!r}).read())
    import vllm.tracing
    from vllm_compile_ext import finder, plugin, versions
    began = finder.finder.timing
    {before}
    plugin.register()
    from vllm.engine.arg_utils import EngineArgs
    assert type(vllm.tracing.otel.trace).__name__ == "module"
    assert not finder.finder.timing
    assert "traceparent" not in os.environ
    assert not hasattr(EngineArgs.create_engine_config, "__wrapped__")
    assert not os.path.exists(os.environ["VLLM_CACHE_ROOT"] + "/compile_starts")
    report([began, plugin.status().active])
"""


def test_a_start_is_not_recorded_where_that_is_off_or_the_plugin_does_not_take_over(tmp_path: Path) -> None:
    cases: list[tuple[str, dict[str, str], list[bool]]] = [
        ("", {"VLLM_COMPILE_STARTS": "0"}, [False, True]),
        ("", {"VLLM_COMPILE_EXT": "0"}, [False, False]),
        ("versions.VLLM = '>99'", {}, [True, False]),
    ]
    codes = [RECORD.format(pth=str(ROOT / "vllm_compile_ext.pth"), before=before) for before, _, _ in cases]
    outcomes = together(
        *(partial(run, code, VLLM_CACHE_ROOT=str(tmp_path), **case[1]) for code, case in zip(codes, cases, strict=True))
    )
    for outcome, (_, _, expected) in zip(outcomes, cases, strict=True):
        assert outcome.value == expected, outcome.output


def test_every_change_is_undone() -> None:
    outcome = run("""
        import sys
        import vllm.engine.arg_utils, vllm.envs, vllm.logger
        from vllm.platforms.cpu import CpuPlatform
        from vllm_compile_ext import plugin
        def state():
            finders = [f for f in sys.meta_path if 'compile_ext' in type(f).__module__]
            return [vllm.envs.compile_factors, vllm.logger.configure_logging, finders,
                    list(vllm.envs.environment_variables), CpuPlatform.__dict__['check_and_update_config']]
        stock = state()
        plugin.register()
        active = state()
        import vllm.compilation.backends
        plugin.unregister()
        import vllm.compilation.backends as again
        report(dict(changed=[a != b for a, b in zip(stock, active)], undone=state() == stock, file=again.__file__,
                    name=again.__name__))
    """)
    assert outcome.value["changed"] == [True] * 5
    assert outcome.value["undone"]
    assert outcome.value["file"].endswith("/vllm/compilation/backends.py")
    assert outcome.value["name"] == "vllm.compilation.backends"


def test_doctor_reports_and_exits_by_health() -> None:
    code = """
        import json, subprocess, sys
        command = [sys.executable, '-m', 'vllm_compile_ext.cli', 'doctor', '--json']
        done = subprocess.run(command, capture_output=True, text=True)
        report(dict(code=done.returncode, **json.loads(done.stdout)))
    """
    well, ill, chosen = (
        outcome.value
        for outcome in together(
            partial(run, code),
            partial(run, code, VLLM_PLUGINS="another", VLLM_COMPILE_DEPYF="2"),
            partial(run, code, VLLM_COMPILE_EXT="0"),
        )
    )
    assert (well["code"], well["healthy"]) == (0, True)
    topics = {line["topic"]: line["state"] for line in well["checks"]}
    assert topics["swap"] == topics["changes"] == topics["versions"] == "ok"
    assert (ill["code"], ill["healthy"]) == (1, False)
    assert {line["topic"] for line in ill["checks"] if line["state"] == "bad"} == {"entry point", "variables", "swap"}
    assert (chosen["code"], {line["topic"]: line["state"] for line in chosen["checks"]}["swap"]) == (0, "off")
