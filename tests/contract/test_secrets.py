"""A canary in every option that `vllm serve` has, and in every variable that vLLM knows, is in nothing that we write.

Nothing is compiled: each option goes through what records the command line, the options and the key's factors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.process import run

CODE = """
    import argparse, dataclasses, io, logging, os, pathlib
    CANARY = "Canary7f3a"
    log = io.StringIO()
    ours = logging.getLogger("vllm_compile_ext")
    ours.addHandler(logging.StreamHandler(log))
    ours.setLevel(logging.DEBUG)
    path = sys.argv[1]

    import torch
    import vllm.envs
    from vllm.plugins import load_general_plugins
    load_general_plugins()
    from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
    from vllm.entrypoints.cli.serve import ServeSubcommand
    from vllm.utils.argparse_utils import FlexibleArgumentParser
    from vllm_compile_ext import harmless, settings
    from vllm_compile_ext.key import factors, misses, torch_settings
    from vllm_compile_ext.key.misses import difference, summary
    from vllm_compile_ext.store.files import Tree
    from vllm_compile_ext.store.store import key_of
    from vllm_compile_ext.record import file, recorder, vllm_spans
    file.KEPT = misses.KEPT = 10**6

    serve = ServeSubcommand().subparser_init(FlexibleArgumentParser().add_subparsers())
    options = [o for action in serve._actions for o in action.option_strings if o.startswith("-")]
    value = f'{{"a": "{CANARY}", "{CANARY}/b": [1, "{CANARY}"]}}'
    url = f"https://user:{CANARY}@host/{CANARY}?token={CANARY}"
    lines = [["python", "-X", CANARY, f"-W{CANARY}", "-c", CANARY], ["python", f"-c{CANARY}"], ["python", "-m", CANARY]]
    lines += [["vllm", "serve", CANARY], ["vllm", CANARY], [f"/{CANARY}", CANARY], ["vllm", "serve", url]]
    for option in options:
        for given in (CANARY, value, url, f"1{CANARY}", f"'{CANARY}'", f"-{CANARY}", f"--{CANARY}={CANARY}"):
            lines += [["vllm", "serve", option, given], ["vllm", "serve", f"{option}={given}", given]]
        for dotted in (f"{option}.{CANARY}", f"{option}.a.{CANARY}", f"{option}.a"):
            lines += [["vllm", "serve", dotted, CANARY], ["vllm", "serve", f"{dotted}={CANARY}"]]
        lines += [["vllm", "serve", option[:end], CANARY, CANARY] for end in range(3, len(option), 3)]
        lines += [["vllm", "serve", f"{option}{CANARY}", "x"], ["vllm", "serve", option.replace("-", "_"), CANARY]]
    out = {"options": len(options), "lines": len(lines)}

    # Each as the command line of a start.
    sys.orig_argv = [word for line in lines for word in line]
    made = object.__new__(AsyncEngineArgs)
    names = [field.name for field in dataclasses.fields(AsyncEngineArgs)]
    kinds = [lambda: CANARY, lambda: [CANARY], lambda: {"a": CANARY}, lambda: {CANARY}, lambda: url]
    kinds += [lambda: dataclasses.make_dataclass("Config", [("a", str, "x")])(CANARY)]
    for kind in kinds:
        for name in names:
            object.__setattr__(made, name, kind())
        made.model = f"s3://user:{CANARY}@host/folder/name?{CANARY}"
        recorder.forget()
        vllm_spans.begin(made)
        recorder.active().stop()
        sys.orig_argv = ["vllm", "serve", CANARY, "--api-k", CANARY]
    out["shown"] = [" ".join(line) for line in lines if CANARY in " ".join(harmless.arguments(line, "m"))]

    sys.orig_argv = ["vllm", "serve", "m"]
    # Real configurations, and what vLLM says of those that it does not take.
    def start(**given):
        recorder.forget()
        limits = dict(model=path, dtype="float32", max_num_batched_tokens=256, max_model_len=256)
        try:
            arguments = EngineArgs(**limits | given)
        except Exception:
            return None
        try:
            return arguments.create_engine_config()
        except Exception:
            return None
        finally:
            to = recorder.active()
            if to is not None:
                to.stop()

    model = torch.nn.Linear(2, 2)
    tree = Tree(settings.store())
    base = factors.factors(start(), model)

    def miss(table):
        changes = difference(base, table)
        ours.info("%s", summary(changes))
        misses.record(tree, misses.Miss(key_of(table), "rank0", "m", table, key_of(base), changes))
        return changes

    taken, refused = {}, []
    for name in names:
        given = [CANARY, {"a": CANARY, "b": {"c": [CANARY]}}]
        given += [[CANARY]] if name in ("model_class_overrides",) else []
        for value in given:
            config = start(**{name: value}) if name not in ("model", "tokenizer", "hf_config_path") else None
            if config is None:
                refused.append(name)
                continue
            try:
                taken[name] = [str(change) for change in miss(factors.factors(config, model))]
            except TypeError:
                refused.append(name)
    config = start()
    vars(config.model_config.hf_config)["note\\x1b[2J\\nfake line"] = f"\\x1b[31m{CANARY}\\n"
    out["escapes"] = [str(change) for change in miss(factors.factors(config, model))]
    out |= {"taken": taken, "refused": len(refused), "sizes": [
        str(change) for change in miss(factors.factors(start(max_num_batched_tokens=512, dtype="bfloat16"), model))
    ]}

    # Variables, known and unknown.
    seen = 0
    for name in [*vllm.envs.environment_variables, *torch_settings.READ_WHILE_COMPILING, "VLLM_CANARY", "HF_TOKEN"]:
        if name == "VLLM_CACHE_ROOT":
            continue
        os.environ[name], before = CANARY, os.environ.get(name)
        try:
            table = torch_settings.variables(cpu=True)
            seen += any("***" in value for value in table.values())
            miss({f"env.{k}": v for k, v in table.items()})
        except Exception:
            pass
        finally:
            del os.environ[name]
            if before is not None:
                os.environ[name] = before
    out["variables"] = seen

    written = [p for p in settings.cache_root().rglob("*") if p.is_file()]
    out["files"] = len(written)
    out["found"] = [str(p) for p in written if CANARY.encode() in p.read_bytes()]
    out["log"] = [line for line in log.getvalue().splitlines() if CANARY in line]
    out["misses"] = [line for line in log.getvalue().split("cache miss: ")[1:]]
    starts = sorted((settings.cache_root() / "compile_starts").glob("*"))
    out["starts"] = len(starts)
    report(out)
"""


@pytest.fixture(scope="module")
def looked(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("secrets")
    outcome = run(CODE, str(llama2), folder=folder, fork=True, plugin=False, VLLM_CACHE_ROOT=str(folder / "cache"))
    assert outcome.value, outcome.output[-3000:]
    return outcome.value


def test_the_canary_is_nowhere(looked: dict[str, Any]) -> None:
    assert looked["options"] > 250
    assert looked["lines"] > 5000
    assert looked["starts"] > 100
    assert looked["files"] > 500
    assert looked["variables"] > 20, "else they did not reach the factors"
    assert (looked["shown"], looked["found"], looked["log"]) == ([], [], [])


def test_a_hidden_value_still_counts(looked: dict[str, Any]) -> None:
    taken = looked["taken"]
    assert {"additional_config", "hf_overrides"} <= taken.keys()
    assert taken["additional_config"] == ["config.additional.a unset -> ***", "config.additional.b unset -> ***"]
    assert "config.model.hf_config.a unset -> ***" in taken["hf_overrides"]


def test_numbers_and_words_are_said(looked: dict[str, Any]) -> None:
    assert "config.scheduler.max_num_batched_tokens 256 -> 512" in looked["sizes"]
    assert "config.model.dtype torch.float32 -> torch.bfloat16" in looked["sizes"]


def test_no_line_is_more_than_a_line(looked: dict[str, Any]) -> None:
    assert len(looked["escapes"]) > 0
    assert all(line.isprintable() for line in looked["escapes"])
    assert all(line.rstrip("\n").isprintable() for line in looked["misses"] if "cache miss" in line)
