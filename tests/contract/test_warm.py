"""What ``vllm-compile-ext warm`` takes from the installed vLLM: its options, its errors, its configuration."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from tests.process import Outcome, run, together

LOOK = """
    import os, stat
    from pathlib import Path
    from vllm_compile_ext.cli import warm_start

    def refused(*arguments, **env):
        os.environ.update(env)
        try:
            args = warm_start.parse(["MODEL", *arguments])
            warm_start.check_plugin()
            warm_start.check_config(warm_start.configure(args), args)
        except warm_start.RefusedError as error:
            return str(error)
        finally:
            for name in env:
                del os.environ[name]

    def checked(config, backend):
        config.parallel_config.distributed_executor_backend = backend  # which need not be installed
        try:
            warm_start.check_config(config, args)
        except warm_start.RefusedError as error:
            return str(error)

    def open_store(mode):
        store = Path("store")
        store.mkdir(exist_ok=True)
        store.chmod(mode)
        return str(store)

    args = warm_start.parse(["MODEL", "--port", "80", "--api-key", "x", "--ssl-keyfile", "k", "--max-model-len", "256",
        "--load-format", "safetensors", "--model-loader-extra-config", '{"enable_multithread_load": true}',
        "--num-gpu-blocks-override", "3"])
    config = warm_start.configure(args)
    key = config.compute_hash()
    warm_start.lighten(config)
    report(dict(
        args=[args.model, args.port, args.max_model_len],
        key=[key, config.compute_hash()],
        light=[config.load_config.load_format, config.load_config.model_loader_extra_config,
            config.model_config.skip_tokenizer_init, config.cache_config.num_gpu_blocks_override],
        nothing=refused(),
        eager=refused("--enforce-eager"),
        disabled=refused(VLLM_DISABLE_COMPILE_CACHE="1"),
        older=refused(VLLM_USE_AOT_COMPILE="0"),
        theirs=refused(VLLM_USE_MEGA_AOT_ARTIFACT="0"),
        unsafe=refused(VLLM_COMPILE_STORE=open_store(0o777)),
        part=refused("--headless"),
        ray=checked(config, "ray"),
    ))
"""


@pytest.fixture(scope="module")
def look(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    root = str(tmp_path_factory.mktemp("root"))
    return run(LOOK.replace("MODEL", str(llama2)), fork=True, VLLM_CACHE_ROOT=root, VLLM_CPU_KVCACHE_SPACE=None)


def test_the_options_of_serve_are_taken(look: Outcome, llama2: Path) -> None:
    assert look.value["args"] == [str(llama2), 80, 256]


def test_nothing_that_is_left_out_changes_the_key(look: Outcome) -> None:
    assert look.value["light"] == ["dummy", {}, True, None]
    before, after = look.value["key"]
    assert before == after


def test_what_cannot_be_kept_is_refused_before_anything_starts(look: Outcome) -> None:
    assert look.value["nothing"] is None
    assert "--enforce-eager" in look.value["eager"]
    assert "VLLM_DISABLE_COMPILE_CACHE=1" in look.value["disabled"]
    assert "VLLM_USE_AOT_COMPILE=0" in look.value["older"]
    assert "keeps it in its own cache: VLLM_USE_MEGA_AOT_ARTIFACT=0" in look.value["theirs"]
    assert "chmod" in look.value["unsafe"]
    assert "a part of an engine" in look.value["part"]
    assert "--distributed-executor-backend ray" in look.value["ray"]


def test_switched_off() -> None:
    code = """
        from vllm_compile_ext.cli import warm_start
        warm_start.parse(["m"])
        try:
            warm_start.check_plugin()
        except warm_start.RefusedError as error:
            report(str(error))
    """
    off, kept_out = together(partial(run, code, VLLM_COMPILE_EXT="0"), partial(run, code, VLLM_PLUGINS=""))
    assert "is off (VLLM_COMPILE_EXT=0)" in off.value
    assert "VLLM_PLUGINS" in kept_out.value


def test_a_bad_option_gives_vllms_own_error() -> None:
    outcome = run(
        """
        import sys
        from vllm_compile_ext.cli import warm_start
        sys.argv[1:] = ["m", "--no-such-option", "3"]
        sys.exit(warm_start.main())
    """,
        fork=True,
    )
    assert outcome.code == 2
    assert "usage: vllm" in outcome.output
    assert "vllm: error: unrecognized arguments: --no-such-option 3" in outcome.output
