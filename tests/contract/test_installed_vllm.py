"""The plugin in a process with the installed vLLM, no engine started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.process import ROOT, Outcome, run
from vllm_compile_ext import versions


def fork(code: str, **env: str) -> Outcome:
    """Run `code` where vLLM is imported as far as its front end has it when it loads plugins."""
    return run(code, fork=True, plugin=False, **env)


LOOK = """
    import pickle, inspect, traceback
    from vllm.plugins import load_general_plugins
    import vllm.envs
    stock_key = vllm.envs.compile_factors()
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
        stock_key=stock_key, key=vllm.envs.compile_factors(),
        model_tag=[backends.model_tag, upstream.backends.model_tag],
    ))
"""


@pytest.fixture(scope="module")
def active() -> Any:
    return fork(LOOK).value


@pytest.fixture(scope="module")
def off() -> Any:
    return fork(LOOK, VLLM_COMPILE_EXT="0").value


def test_active_and_says_so(active: Any) -> None:
    assert active["active"]
    assert "is active" in active["line"]
    assert active["same"], "register is idempotent"
    assert active["new_torch"] == [], "loading imports nothing of torch"


def test_vllm_gets_our_module_under_its_name_and_upstreams_stays_importable(active: Any) -> None:
    assert active["backends"].endswith("vllm_compile_ext/compilation/backends.py")
    assert active["names"] == ["vllm_compile_ext.compilation.backends"] * 2
    assert active["one_object"]
    assert active["upstream_file"].endswith("/vllm/compilation/backends.py")
    assert active["shared_counter"]
    assert active["model_tag"] == ["backbone", "backbone"]


def test_tools_see_our_source(active: Any) -> None:
    assert "def bytecode_hook" in active["source"]
    assert active["source_file"].endswith("vllm_compile_ext/compilation/wrapper.py")
    assert active["pickled"]
    assert "vllm_compile_ext/compilation/backends.py" in active["trace"]


def test_variables_are_known_and_out_of_the_key(active: Any, off: Any) -> None:
    names = ["VLLM_COMPILE_DEPYF", "VLLM_COMPILE_EXT", "VLLM_COMPILE_EXT_STRICT"]
    assert active["known"] == off["known"] == names
    # Only the plugin's own version tells our entries from stock's.
    assert active["key"].keys() - active["stock_key"].keys() == {"vllm_compile_ext"}


def test_kill_switch_is_stock(off: Any) -> None:
    assert not off["active"]
    assert "VLLM_COMPILE_EXT=0" in off["line"]
    assert off["backends"].endswith("/vllm/compilation/backends.py")
    assert "/vllm/compilation/backends.py" in off["trace"]
    assert off["key"] == off["stock_key"]


GIVE_UP = """
    import os
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
    "unsupported vLLM": ("versions.VLLM = '>=99'", {}, "vllm " + versions.vllm_version().partition("+")[0], "WARNING"),
    "imported too early": ("import vllm.compilation.decorators", {}, "vllm.compilation.decorators", "WARNING"),
    "bad value": ("", {"VLLM_COMPILE_DEPYF": "banana"}, "VLLM_COMPILE_DEPYF='banana'", "ERROR"),
    "surprise": (
        "make = changes.make; changes.make = lambda *kinds: make(*kinds) if changes.OFF in kinds else 1 / 0",
        {},
        "ZeroDivisionError",
        "WARNING",
    ),
}


@pytest.mark.parametrize("reason", REASONS)
def test_whatever_is_wrong_vllm_is_stock_and_one_line_says_why(reason: str) -> None:
    before, env, named, level = REASONS[reason]
    outcome = fork(GIVE_UP.format(before=before), **env)
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
    from vllm.v1.engine.async_llm import AsyncLLM
    assert type(vllm.tracing.otel.trace).__name__ == "module"
    assert not finder.finder.timing
    assert "traceparent" not in os.environ
    assert not hasattr(AsyncLLM.add_request, "__wrapped__")
    assert not os.path.exists(os.environ["VLLM_CACHE_ROOT"] + "/compile_starts")
    report([began, plugin.status().active])
"""


@pytest.mark.parametrize(
    ("before", "env", "began", "is_active"),
    [
        ("", {"VLLM_COMPILE_STARTS": "0"}, False, True),
        ("", {"VLLM_COMPILE_EXT": "0"}, False, False),
        ("versions.VLLM = '>99'", {}, True, False),
    ],
)
def test_a_start_is_not_recorded_where_that_is_off_or_the_plugin_does_not_take_over(
    tmp_path: Path, before: str, env: dict[str, str], began: bool, is_active: bool
) -> None:
    code = RECORD.format(pth=str(ROOT / "vllm_compile_ext.pth"), before=before)
    # Where the record begins, it does so before vLLM is imported.
    outcome = run(code, VLLM_CACHE_ROOT=str(tmp_path), fork=not began, plugin=False, **env)
    assert outcome.value == [began, is_active], outcome.output


def test_every_change_is_undone() -> None:
    outcome = fork("""
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


DOCTOR = """
    from typer.testing import CliRunner
    from vllm_compile_ext.cli import app
    done = CliRunner().invoke(app, ["doctor", "--json"])
    report(dict(code=done.exit_code, **json.loads(done.stdout)))
"""


@pytest.mark.parametrize(
    ("env", "code", "states"),
    [
        ({}, 0, {"swap": "ok", "changes": "ok", "versions": "ok"}),
        (
            {"VLLM_PLUGINS": "another", "VLLM_COMPILE_DEPYF": "2"},
            1,
            {"entry point": "bad", "variables": "bad", "swap": "bad"},
        ),
        ({"VLLM_COMPILE_EXT": "0"}, 0, {"swap": "off"}),
    ],
)
def test_doctor_reports_and_exits_by_health(env: dict[str, str], code: int, states: dict[str, str]) -> None:
    found = run(DOCTOR, fork=bool(env), plugin=False, **env).value  # the first imports vLLM itself
    assert (found["code"], found["healthy"]) == (code, code == 0)
    topics = {line["topic"]: line["state"] for line in found["checks"]}
    assert states.items() <= topics.items()
    assert topics["bytecode"] in ("ok", "off")  # as the installation is
    assert code == 0 or {topic for topic in topics if topics[topic] == "bad"} == states.keys()
