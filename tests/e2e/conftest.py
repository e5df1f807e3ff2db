"""One server per test module: its metrics then tell of that module's requests alone."""

from collections.abc import Iterator

import pytest

from .server import Server, serve


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve(tmp_path_factory.mktemp("server")) as running:
        yield running
