"""The image, as far as it can be judged without building it."""

import json
import re
import tomllib
from pathlib import Path

import pytest


@pytest.fixture
def instructions(repository: Path) -> list[tuple[str, str]]:
    """(keyword, argument) of each instruction, with continuation lines joined."""
    text = re.sub(r"^#.*\n", "", (repository / "deploy/Dockerfile").read_text(), flags=re.MULTILINE)
    lines = text.replace("\\\n", " ").splitlines()
    return [(line.split()[0], line.partition(" ")[2].strip()) for line in lines if line.strip()]


@pytest.fixture
def final_stage(instructions: list[tuple[str, str]]) -> list[tuple[str, str]]:
    last = max(index for index, (keyword, _) in enumerate(instructions) if keyword == "FROM")
    return instructions[last:]


def test_it_has_stages_and_runs_as_nobody_in_particular(
    instructions: list[tuple[str, str]], final_stage: list[tuple[str, str]]
) -> None:
    assert [keyword for keyword, _ in instructions].count("FROM") == 3
    (user,) = [argument for keyword, argument in final_stage if keyword == "USER"]
    assert re.fullmatch(r"[1-9]\d*:[1-9]\d*", user)


def test_signals_reach_the_program(final_stage: list[tuple[str, str]]) -> None:
    arguments = dict(final_stage)
    assert json.loads(arguments["ENTRYPOINT"]) == ["tokenmill"]
    assert json.loads(arguments["CMD"]) == ["worker"]


def test_python_does_not_import_from_the_working_directory(
    final_stage: list[tuple[str, str]],
) -> None:
    assert "PYTHONSAFEPATH=1" in dict(final_stage)["ENV"].split()


def test_home_can_be_written(final_stage: list[tuple[str, str]]) -> None:
    assert "HOME=/tmp" in dict(final_stage)["ENV"].split()


def test_every_installation_is_pinned(instructions: list[tuple[str, str]]) -> None:
    installs = [
        part
        for keyword, argument in instructions
        if keyword == "RUN"
        for part in re.findall(r"pip install [^;&]*", argument)
    ]
    assert len(installs) == 4
    for install in installs:
        assert "-c constraints.txt" in install or "--no-index" in install


def test_no_secret_is_baked_in(instructions: list[tuple[str, str]]) -> None:
    for keyword, argument in instructions:
        if keyword in {"ARG", "ENV"}:
            assert not re.search(r"SECRET|TOKEN=|PASSWORD|_KEY|REDIS", argument)


def test_the_build_context_holds_what_the_wheel_needs_and_no_more(repository: Path) -> None:
    lines = (repository / ".dockerignore").read_text().splitlines()
    admitted = {line[1:] for line in lines if line.startswith("!")}
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    packages = {path.name for path in (repository / "src" / "tokenmill").iterdir() if path.is_dir()}
    packages.discard("__pycache__")
    needed = {"constraints.txt", "pyproject.toml", project["readme"], "src", *packages}
    assert admitted == needed | set(project["license-files"])
    assert "*" in lines
