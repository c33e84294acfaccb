"""A real start whose options and variables hold a canary: it is in no file that it leaves, and in no line of ours."""

from __future__ import annotations

import zlib
from pathlib import Path

import msgspec

from tests import process
from vllm_compile_ext.key.seen import Seen
from vllm_compile_ext.store.store import Store

CANARY = "Canary7f3a"
CODE = """
    import logging, os
    logging.getLogger("vllm_compile_ext").addHandler(logging.FileHandler("ours.log"))
    logging.getLogger("vllm_compile_ext").setLevel(logging.DEBUG)
    CANARY = os.environ["A_TOKEN"]
    from vllm import LLM, SamplingParams
    from tests.engine import LIMITS
    LLM(
        sys.argv[1], dtype="float32", **LIMITS,
        additional_config={"api_key": CANARY, "x": {"y": CANARY}},
        hf_overrides={"note": CANARY, "nested": {"token": CANARY}, "url": f"https://u:{CANARY}@h"},
        served_model_name=f"https://user:{CANARY}@host/{CANARY}?token={CANARY}",
        download_dir=f"/tmp/{CANARY}",
        model_loader_extra_config={},
    ).generate("x", SamplingParams(max_tokens=2), use_tqdm=False)
    report(True)
"""


def test_the_canary_is_nowhere(llama2: Path, tmp_path: Path) -> None:
    cache, temporary, run = (tmp_path / name for name in ("cache", "tmp", "run"))
    temporary.mkdir()
    env = {"A_TOKEN": CANARY, "VLLM_UNKNOWN_TO_ALL": CANARY, "VLLM_GC_DEBUG": CANARY, "VLLM_IMAGE_TAG": CANARY}
    env |= {"VLLM_CACHE_ROOT": str(cache), "TMPDIR": str(temporary), "VLLM_LOGGING_LEVEL": "DEBUG"}
    env |= {"VLLM_RAY_EXTRA_ENV_VARS_TO_COPY": CANARY}
    outcome = process.run(CODE, str(llama2), CANARY, folder=run, **env)
    assert outcome.value, outcome.output[-3000:]
    files = [p for folder in (cache, temporary) for p in folder.rglob("*") if p.is_file()]
    assert len(files) > 10
    assert [p for p in (*files, run / "ours.log") if CANARY.encode() in p.read_bytes()] == []
    assert [p for p in (*cache.rglob("*"), *temporary.rglob("*")) if CANARY in p.name] == []
    assert "cache miss" in (run / "ours.log").read_text()
    store = Store.open(cache / "compile_store")
    (manifest,) = [each for each in store.manifests() if each.kind == "program"]
    assert manifest.factors["config.additional.api_key"].startswith("***")
    assert manifest.factors["config.model.hf_config.nested.token"].startswith("***")
    seen = msgspec.msgpack.decode(store.get(manifest.members["seen"]), type=Seen)
    assert CANARY.encode() not in zlib.decompress(seen.lines)
