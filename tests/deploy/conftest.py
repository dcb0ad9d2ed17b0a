"""`render`: the kustomizations of deploy/k8s without kubectl, so that the checks run everywhere.

It knows the fields that are used there and refuses every other one. Names of generated ConfigMaps
get no content hash. Where kubectl is installed, a test holds this against it.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

Document = dict[str, Any]
Render = Callable[[Path], list[Document]]

CLUSTER_WIDE = {"Namespace"}
FIELDS = {
    "apiVersion",
    "kind",
    "resources",
    "components",
    "configMapGenerator",
    "images",
    "labels",
    "namespace",
    "patches",
    "replicas",
}


@pytest.fixture(scope="session")
def repository() -> Path:
    return Path(__file__).parents[2]


@pytest.fixture(scope="session")
def render() -> Render:
    return lambda directory: _render(directory, [])


def _render(directory: Path, inherited: list[Document]) -> list[Document]:
    """Apply one kustomization to its own resources and, for a component, to those of its parent."""
    spec = yaml.safe_load((directory / "kustomization.yaml").read_text())
    unknown = set(spec) - FIELDS
    if unknown:
        raise NotImplementedError(f"{directory}: this renderer does not know {sorted(unknown)}")
    documents = inherited
    for name in spec.get("resources", []):
        path = directory / name
        if path.is_dir():
            documents = documents + _render(path, [])
        else:
            documents = documents + list(yaml.safe_load_all(path.read_text()))
    for generator in spec.get("configMapGenerator", []):
        documents = _generate(documents, generator)
    for name in spec.get("components", []):
        documents = _render(directory / name, documents)
    for patch in spec.get("patches", []):
        change = yaml.safe_load((directory / patch["path"]).read_text())
        target = _find(documents, change["kind"], change["metadata"]["name"])
        documents = [_merge(d, change) if d is target else d for d in documents]
    for document in documents:
        _transform(document, spec)
    return documents


def _generate(documents: list[Document], generator: Document) -> list[Document]:
    data = dict(literal.split("=", 1) for literal in generator["literals"])
    if generator.get("behavior") == "merge":
        _find(documents, "ConfigMap", generator["name"])["data"].update(data)
        return documents
    metadata = {"name": generator["name"]}
    return [
        *documents,
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data},
    ]


def _transform(document: Document, spec: Document) -> None:
    metadata = document["metadata"]
    if "namespace" in spec and document["kind"] not in CLUSTER_WIDE:
        metadata["namespace"] = spec["namespace"]
    for labels in spec.get("labels", []):
        metadata["labels"] = metadata.get("labels", {}) | labels["pairs"]
    if document["kind"] != "Deployment":
        return
    for replicas in spec.get("replicas", []):
        if replicas["name"] == metadata["name"]:
            document["spec"]["replicas"] = replicas["count"]
    pod = document["spec"]["template"]["spec"]
    for image in spec.get("images", []):
        for container in pod["containers"] + pod.get("initContainers", []):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"


def _find(documents: list[Document], kind: str, name: str) -> Document:
    return next(d for d in documents if (d["kind"], d["metadata"]["name"]) == (kind, name))


def _merge(old: Any, new: Any) -> Any:
    """Strategic merge, in so far as it is used: maps by key, lists of named things by name."""
    if isinstance(old, dict) and isinstance(new, dict):
        merged = {key: _merge(old[key], new[key]) if key in new else old[key] for key in old}
        return merged | {key: value for key, value in new.items() if key not in old}
    if isinstance(old, list) and isinstance(new, list) and all("name" in entry for entry in new):
        named = {entry["name"]: entry for entry in new}
        kept = [_merge(entry, named.pop(entry["name"], entry)) for entry in old]
        return list(named.values()) + kept  # as kustomize does
    return new
