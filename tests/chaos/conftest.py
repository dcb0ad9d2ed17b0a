"""One zygote and one server for all stages of a module."""

from collections.abc import Callable, Iterator

import pytest

from server import ChaosServer
from stage import Stage
from zygote import Zygote


@pytest.fixture(scope="module")
def zygote() -> Iterator[Zygote]:
    with Zygote() as zygote:
        yield zygote


@pytest.fixture(scope="module")
def chaos_server() -> Iterator[ChaosServer]:
    with ChaosServer() as server:
        yield server


@pytest.fixture
def make_stage(zygote: Zygote, chaos_server: ChaosServer) -> Iterator[Callable[[str], Stage]]:
    made: list[Stage] = []

    def make(mutant: str = "") -> Stage:
        made.append(Stage(zygote, chaos_server, mutant))
        return made[-1]

    yield make
    for stage in made:
        stage.close()
