"""What a platform engineer would check in review, for the base and for every overlay."""

import re
import shutil
import subprocess
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import kubernetes_validate
import pytest
import yaml

from tokenmill.engine.sources import models_home
from tokenmill.producer.address import TLS_VARIABLES
from tokenmill.producer.cli import tokenmill
from tokenmill.worker.config import WorkerConfig

Document = dict[str, Any]
Render = Callable[[Path], list[Document]]

# Settings without an option, and the function that reads each.
READ_WITHOUT_OPTION = {"TOKENMILL_MODELS_DIR": models_home}
K8S = Path(__file__).parents[2] / "deploy" / "k8s"
OVERLAYS = [K8S / "base", *sorted((K8S / "overlays").iterdir())]
KUBERNETES_VERSIONS = ["1.31", "1.37"]  # the oldest with every field that is used, and the newest


@pytest.fixture(params=OVERLAYS, ids=lambda path: path.name)
def documents(request: pytest.FixtureRequest, render: Render) -> list[Document]:
    return render(request.param)


@pytest.fixture
def deployment(documents: list[Document]) -> Document:
    return only(documents, "Deployment")


@pytest.fixture
def pod(deployment: Document) -> Document:
    spec: Document = deployment["spec"]["template"]["spec"]
    return spec


@pytest.fixture
def worker(pod: Document) -> Document:
    (container,) = pod["containers"]
    found: Document = container
    return found


def command_context(words: list[str]) -> click.Context:
    """The context in which the command line runs these words: commands and their groups."""
    context = tokenmill.make_context("tokenmill", [words[0]])
    for word in words:
        assert isinstance(context.command, click.Group)
        command = context.command.get_command(context, word)
        assert command is not None, f"{word}: no such command"
        context = click.Context(command, parent=context, info_name=word)
    return context


def only(documents: list[Document], kind: str) -> Document:
    (document,) = [document for document in documents if document["kind"] == kind]
    return document


@pytest.mark.parametrize("directory", OVERLAYS, ids=lambda path: path.name)
def test_the_renderer_of_these_tests_agrees_with_kubectl(directory: Path, render: Render) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is not installed; the other tests here do not need it")
    text = subprocess.check_output([kubectl, "kustomize", str(directory)], text=True)
    text = re.sub(r"\b(tokenmill-worker)-[a-z0-9]{10}\b", r"\1", text)  # the content hash
    by_kind = {document["kind"]: document for document in yaml.safe_load_all(text)}
    assert by_kind == {document["kind"]: document for document in render(directory)}


@pytest.mark.parametrize("version", KUBERNETES_VERSIONS)
def test_every_document_is_valid(documents: list[Document], version: str) -> None:
    assert len(documents) >= 5
    for document in documents:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_validation_refuses_a_misspelt_field(documents: list[Document], pod: Document) -> None:
    pod["terminationGracePeriodSecond"] = 60
    with pytest.raises(kubernetes_validate.ValidationError, match="terminationGracePeriodSecond"):
        kubernetes_validate.validate(only(documents, "Deployment"), "1.37", strict=True)


def test_pods_fit_the_restricted_security_profile(pod: Document) -> None:
    context = pod["securityContext"]
    assert context["runAsNonRoot"] is True
    assert context["runAsUser"] > 0
    assert context["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)
    assert all(set(volume) <= {"name", "emptyDir"} for volume in pod["volumes"])
    for container in pod["containers"] + pod["initContainers"]:
        assert container["securityContext"] == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }


def test_no_token_of_the_cluster_reaches_the_pod(documents: list[Document], pod: Document) -> None:
    account = only(documents, "ServiceAccount")
    assert pod["serviceAccountName"] == account["metadata"]["name"]
    assert pod["automountServiceAccountToken"] is account["automountServiceAccountToken"] is False


def test_probes_ask_the_health_port(documents: list[Document], worker: Document) -> None:
    (port,) = [port for port in worker["ports"] if port["name"] == "health"]
    settings = only(documents, "ConfigMap")["data"]
    assert str(port["containerPort"]) == settings["TOKENMILL_HEALTH_PORT"]
    paths = {"startupProbe": "/startedz", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    for probe, path in paths.items():
        assert worker[probe]["httpGet"] == {"path": path, "port": "health"}
    startup = worker["startupProbe"]
    assert startup["failureThreshold"] * startup["periodSeconds"] >= 300


def test_a_drain_fits_into_the_grace_period(pod: Document) -> None:
    """The step that runs when the signal comes must end first; it is given ten seconds."""
    drain_s = WorkerConfig(model="any", redis_url="redis://any").drain_s
    assert pod["terminationGracePeriodSeconds"] >= drain_s + 10


def test_a_rollout_needs_no_second_accelerator(deployment: Document) -> None:
    strategy = deployment["spec"]["strategy"]["rollingUpdate"]
    assert strategy == {"maxSurge": 0, "maxUnavailable": 1}


def test_selectors_match_the_pods(documents: list[Document], deployment: Document) -> None:
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    selectors = [
        deployment["spec"]["selector"],
        only(documents, "PodDisruptionBudget")["spec"]["selector"],
        only(documents, "NetworkPolicy")["spec"]["podSelector"],
    ]
    for selector in selectors:
        assert selector["matchLabels"]
        assert selector["matchLabels"].items() <= labels.items()


def test_references_name_what_exists(documents: list[Document], pod: Document) -> None:
    settings = only(documents, "ConfigMap")["metadata"]["name"]
    volumes = {volume["name"] for volume in pod["volumes"]}
    mounted = []
    for container in pod["containers"] + pod["initContainers"]:
        assert container["envFrom"] == [{"configMapRef": {"name": settings}}]
        mounted.append({mount["name"] for mount in container["volumeMounts"]})
        assert mounted[-1] <= volumes
    assert mounted[0] == volumes


def test_a_group_has_as_many_gpus_as_ranks(documents: list[Document], worker: Document) -> None:
    ranks = only(documents, "ConfigMap")["data"].get("TOKENMILL_TENSOR_PARALLEL_SIZE", "1")
    gpus = worker["resources"]["limits"].get("nvidia.com/gpu", 1)
    assert int(ranks) == gpus


def test_resources_are_bounded_but_the_cpu_is_not_throttled(pod: Document) -> None:
    for container in pod["containers"] + pod["initContainers"]:
        resources = container["resources"]
        assert {"cpu", "memory", "ephemeral-storage"} <= resources["requests"].keys()
        assert "memory" in resources["limits"]
        assert "cpu" not in resources["limits"]


def test_the_model_uses_as_many_threads_as_cpus_are_requested(
    documents: list[Document], worker: Document
) -> None:
    settings = only(documents, "ConfigMap")["data"]
    assert settings["TOKENMILL_THREADS"] == worker["resources"]["requests"]["cpu"]


def test_directories_in_the_environment_are_writable(
    documents: list[Document], worker: Document
) -> None:
    mounted = [Path(mount["mountPath"]) for mount in worker["volumeMounts"]]
    settings = only(documents, "ConfigMap")["data"]
    directories = [Path(value) for value in settings.values() if value.startswith("/")]
    assert len(directories) >= 4
    for directory in directories:
        assert any(directory.is_relative_to(mount) for mount in mounted), directory


def test_every_setting_is_one_that_the_programs_read(
    documents: list[Document], pod: Document, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = set(only(documents, "ConfigMap")["data"])
    for container in pod["containers"] + pod["initContainers"]:
        names |= {variable["name"] for variable in container.get("env", [])}
    ours = {name for name in names if name.startswith("TOKENMILL_")}
    assert {"TOKENMILL_REDIS_URL", "TOKENMILL_MODEL"} <= ours
    for name in ours - READ_WITHOUT_OPTION.keys():
        monkeypatch.setenv(name, "1")
        context = command_context(["worker"])
        read = [option.resolve_envvar_value(context) for option in context.command.params]
        assert "1" in read, f"{name}: no option of the worker reads it"
        monkeypatch.delenv(name)


def test_directories_are_read_where_the_manifests_put_them(
    render: Render, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = only(render(K8S / "base"), "ConfigMap")["data"]
    for name, read in READ_WITHOUT_OPTION.items():
        monkeypatch.setenv(name, settings[name])
        assert read() == Path(settings[name])


def test_the_containers_run_commands_that_exist(pod: Document) -> None:
    for container in pod["containers"] + pod["initContainers"]:
        words = [word for word in container["args"] if not word.startswith("$(")]
        assert command_context(words).command.name == words[-1]


def test_the_redis_url_comes_from_a_secret(documents: list[Document], worker: Document) -> None:
    (url,) = [v for v in worker["env"] if v["name"] == "TOKENMILL_REDIS_URL"]
    assert url["valueFrom"]["secretKeyRef"] == {"name": "tokenmill-redis", "key": "url"}
    assert not [document for document in documents if document["kind"] == "Secret"]


def test_certificates_of_redis_are_mounted_where_they_are_read(
    tmp_path: Path, render: Render
) -> None:
    parts = {"resources": [str(K8S / "base")], "components": [str(K8S / "components/redis-tls")]}
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(parts))
    documents = render(tmp_path)
    for document in documents:
        kubernetes_validate.validate(document, KUBERNETES_VERSIONS[-1], strict=True)
    pod = only(documents, "Deployment")["spec"]["template"]["spec"]
    settings = only(documents, "ConfigMap")["data"]
    mounts = {mount["name"]: mount for mount in pod["containers"][0]["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod["volumes"]}
    assert mounts["redis-tls"]["readOnly"] is True
    assert volumes["redis-tls"]["secret"]["secretName"] == "tokenmill-redis-tls"
    for variable in TLS_VARIABLES.values():
        assert Path(settings[variable]).parent == Path(mounts["redis-tls"]["mountPath"])


def test_the_gpu_is_asked_for_by_the_component_alone(render: Render) -> None:
    def limits(directory: Path) -> Document:
        spec = only(render(directory), "Deployment")["spec"]["template"]["spec"]
        found: Document = spec["containers"][0]["resources"]["limits"]
        return found

    assert "nvidia.com/gpu" not in limits(K8S / "base")
    assert limits(K8S / "overlays" / "example")["nvidia.com/gpu"] == 1


def test_the_example_names_this_version(repository: Path) -> None:
    project = tomllib.loads((repository / "pyproject.toml").read_text())["project"]
    example = yaml.safe_load((K8S / "overlays" / "example" / "kustomization.yaml").read_text())
    assert [image["newTag"] for image in example["images"]] == [project["version"]]
