from __future__ import annotations

import resource
from collections.abc import Iterator
from pathlib import Path

import pytest
from openai import OpenAI

from roundhouse_server import KEY, RoundhouseServer, echo


@pytest.fixture(scope="session", autouse=True)
def _many_connections() -> None:
    """A thousand calls at once are a thousand sockets here, and more in the server, which inherits the limit."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoundhouseServer]:
    """Without keys, as on a laptop: two text models, one for images, one for sound."""
    models = {
        "alpha": echo(aliases=["gpt-4o-mini"], max_attempts=1),
        "beta": echo(),
        "paint": echo("image"),
        "sing": echo("audio"),
    }
    settings = {"disconnect_grace": "100ms", "backoff_first": "100ms"}
    with RoundhouseServer(tmp_path_factory.mktemp("plain"), models, server=settings) as server:
        yield server


@pytest.fixture(scope="session")
def client(server: RoundhouseServer) -> Iterator[OpenAI]:
    """The SDK as it comes."""
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused") as client:
        yield client


@pytest.fixture(scope="session")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RoundhouseServer]:
    """With a key, room for two queued jobs, and hops after 0.3 s where others have 85: loading takes several."""
    models = {
        "slow": echo("text", "--load-s", "1.5", limit=1, max_attempts=1),
        "tune": echo("audio"),
        "draw": echo("image"),
    }
    with RoundhouseServer(
        tmp_path_factory.mktemp("impatient"),
        models,
        key=KEY,
        server={"sync_hop": "300ms", "sync_max_hops": 18, "hop_grace": "2s", "disconnect_grace": "1s"},
        scheduler={"queued_max": 2},
    ) as server:
        yield server


@pytest.fixture(scope="session")
def keyed(impatient: RoundhouseServer) -> Iterator[OpenAI]:
    """The SDK with the right key."""
    with OpenAI(base_url=f"{impatient.url}/v1", api_key=KEY) as client:
        yield client


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path
