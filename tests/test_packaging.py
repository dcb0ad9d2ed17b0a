"""The package: the wheel holds the tree, nothing else, and the producer comes without torch."""

import importlib.util
import json
import os
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("producer", "worker", "engine", "kernels")


def run(*command: str | Path, cwd: Path | None = None) -> str:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "TOKENMILL"))}
    done = subprocess.run(
        command, cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command} failed:\n{done.stdout}\n{done.stderr}"
    return done.stdout


def sources() -> set[str]:
    """Every module, script and table of the tree, as a path below site-packages."""
    found = {"tokenmill/__init__.py", "tokenmill/py.typed"}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*"):
            if path.suffix in (".py", ".lua", ".json"):
                found.add(f"tokenmill/{path.relative_to(ROOT)}")
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what git would hand out, by way of the source distribution."""
    tree = tmp_path_factory.mktemp("tree")
    tracked = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, tracked.split("\0")):
        source, target = ROOT / name, tree / name
        if not (source.is_symlink() or source.exists()):
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            target.write_bytes(source.read_bytes())
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", tree / "dist", cwd=tree)
    (built,) = (tree / "dist").glob("*.whl")
    return built


def test_links_lead_to_the_four_directories() -> None:
    for package in PACKAGES:
        link = ROOT / "src" / "tokenmill" / package
        assert str(link.readlink()) == f"../../{package}"
        assert link.resolve() == ROOT / package


def test_no_top_level_package_of_a_generic_name() -> None:
    """A `kernels/__init__.py` breaks transformers where Hugging Face's kernels is installed."""
    for package in PACKAGES:
        assert not (ROOT / package / "__init__.py").exists()
        spec = importlib.util.find_spec(package)
        assert spec is None or spec.origin is None or "site-packages" in spec.origin


def test_the_wheel_holds_exactly_the_tree(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as content:
        names = set(content.namelist())
    assert {name for name in names if ".dist-info/" not in name} == sources()


def test_the_producer_installs_alone(wheel: Path, tmp_path: Path) -> None:
    """Without extras: no torch, nothing of ours but `tokenmill`, and the commands explain."""
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env" / "bin" / "python"
    run(python, "-m", "pip", "install", "-qq", "-c", ROOT / "constraints.txt", wheel)
    listed = json.loads(run(python, "-m", "pip", "list", "--format", "json"))
    assert not {"torch", "transformers", "triton", "numba", "numpy"} & {p["name"] for p in listed}
    script = """if True:
        import importlib.metadata, json, sys
        import tokenmill.producer.client
        files = importlib.metadata.files("tokenmill")
        tops = {f.parts[0] for f in files if f.parts[0] != ".."}
        print(json.dumps([sorted(tops), "torch" in sys.modules]))
    """
    tops, torch_loaded = json.loads(run(python, "-I", "-c", script))
    assert [name for name in tops if not name.endswith(".dist-info")] == ["tokenmill"]
    assert not torch_loaded
    tokenmill = tmp_path / "env" / "bin" / "tokenmill"
    assert "generate" in run(tokenmill, "--help")
    command = [str(tokenmill), "worker", "--model", "smollm2", "--redis", "unix:///nowhere"]
    refused = subprocess.run(command, capture_output=True, text=True, check=False)
    assert refused.returncode == 2
    assert "pip install 'tokenmill[worker]'" in refused.stderr
