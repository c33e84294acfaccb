"""The phases of the spans that vLLM makes itself (0.32.0, each use of `vllm.tracing.instrument`)."""

from __future__ import annotations

# Where a span waits for other processes, its phase is "spawn": theirs say what they do meanwhile.
PHASES: dict[str, str] = {
    "API server setup": "api server",
    "Overall Loading": "spawn",
    "SyncMPClient init": "spawn",
    "AsyncMPClient init": "spawn",
    "EngineCoreProc init": "config",
    "Executor init": "spawn",
    "Worker init": "distributed",
    "Init device": "distributed",
    "Load model": "model construction",
    "Loading (CPU)": "model construction",
    "Loading (GPU)": "model construction",
    "Initialize model": "model construction",
    "Download weights - HF": "weights",
    "Load weights": "weights",
    "Prepare model": "kv cache",
    "Allocate KV cache": "kv cache",
    "Compile graph": "compile",
    "Inductor compilation": "compile",
    "Warmup (CPU)": "warm-up",
    "Warmup (GPU)": "warm-up",
    "DeepGemm warmup": "warm-up",
    "CuTeDSL warmup": "warm-up",
    "MiniMax M3 MSA warmup": "warm-up",
    "Capture model": "graph capture",
}
