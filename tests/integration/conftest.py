"""Starts that more than one module looks at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import otlp, process
from tests.served import PARENT, TRACE, Served, path_with_pth, serve, two_ranks


@pytest.fixture(scope="session")
def served_in(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("served")


@pytest.fixture(scope="session")
def cold_server(llama2: Path, served_in: Path) -> Iterator[Served]:
    """With imports timed, an orchestrator's trace, and vLLM told to export."""
    with otlp.grpc_receiver() as receiver:
        path = path_with_pth(served_in / "site")
        env = {"TRACEPARENT": f"00-{TRACE}-{PARENT}-01"}
        yield serve(llama2, served_in, "cold", receiver, env, "--otlp-traces-endpoint", receiver.endpoint, path=path)


@pytest.fixture(scope="session")
def warm_server(llama2: Path, served_in: Path, cold_server: Served) -> Iterator[Served]:
    """Without the .pth file, and exporting as OpenTelemetry's own variables say."""
    with otlp.http_receiver() as receiver:
        env = {
            "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
            "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
        }
        yield serve(llama2, served_in, "warm", receiver, env, path=process.BASE["PYTHONPATH"])


@pytest.fixture(scope="session")
def cold_ranks(llama2: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[process.Outcome, Path]:
    """Two tensor parallel ranks, and their cache root."""
    folder = tmp_path_factory.mktemp("ranks")
    return two_ranks(llama2, folder / "cold", folder / "root"), folder / "root"
