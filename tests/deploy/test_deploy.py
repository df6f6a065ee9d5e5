"""What is deployed against what the code has: ports, paths, flags, variables, names of metrics."""

from __future__ import annotations

import configparser
import json
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import typer.main

from dmd2.cli import app as command_line
from dmd2.service.http import server
from dmd2.service.http.app import create_app
from dmd2.service.http.metrics import Metrics

yaml = pytest.importorskip("yaml")

ROOT = Path(__file__).resolve().parents[2]
KUSTOMIZE = ROOT / "deploy" / "kustomize"
OVERLAYS = sorted(path.name for path in (KUSTOMIZE / "overlays").iterdir())
DASHBOARD = ROOT / "deploy" / "grafana" / "dmd2.json"


def read(path: Path) -> dict[str, Any]:
    documents = list(yaml.safe_load_all(path.read_text(encoding="utf-8")))
    assert len(documents) == 1 and isinstance(documents[0], dict), path
    return documents[0]


def container(name: str) -> dict[str, Any]:
    """The overlay's patch of the one container."""
    patch = read(KUSTOMIZE / "overlays" / name / "container.yaml")
    (found,) = patch["spec"]["template"]["spec"]["containers"]
    return dict(found)


def base() -> dict[str, Any]:
    return dict(read(KUSTOMIZE / "base" / "deployment.yaml")["spec"]["template"]["spec"])


def flags(arguments: list[str]) -> dict[str, str]:
    pairs = zip(arguments[::2], arguments[1::2], strict=True)
    return dict(pairs)


def test_every_manifest_is_named_by_a_kustomization_and_the_other_way_round() -> None:
    for file in KUSTOMIZE.rglob("kustomization.yaml"):
        content = read(file)
        named = [*content.get("resources", []), *(patch["path"] for patch in content.get("patches", []))]
        assert all((file.parent / name).exists() for name in named), file
        assert {name for name in named if not name.startswith("..")} == {
            path.name for path in file.parent.glob("*.yaml") if path != file
        }
    for path in KUSTOMIZE.rglob("*.yaml"):
        assert read(path)["apiVersion"] and read(path)["kind"]
    assert OVERLAYS == ["cog", "serve"]


@pytest.mark.parametrize("name", OVERLAYS)
def test_a_patch_is_of_the_deployment_and_its_probes_ask_the_port_that_it_opens(name: str) -> None:
    whole, patch = (
        read(KUSTOMIZE / "base" / "deployment.yaml"),
        read(KUSTOMIZE / "overlays" / name / "container.yaml"),
    )
    assert (patch["kind"], patch["metadata"]["name"]) == (whole["kind"], whole["metadata"]["name"])
    (original,) = base()["containers"]
    changed = container(name)
    assert changed["name"] == original["name"]
    (port,) = changed["ports"]
    service = read(KUSTOMIZE / "base" / "service.yaml")
    assert {each["targetPort"] for each in service["spec"]["ports"]} == {port["name"]}
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = changed[kind]
        assert "exec" in probe or probe["httpGet"]["port"] == port["name"]
    overlay = read(KUSTOMIZE / "overlays" / name / "kustomization.yaml")
    assert [image["name"] for image in overlay["images"]] == [original["image"]]
    # Nothing is published: whoever deploys says where they pushed it.
    assert all(image["newName"] == "dmd2" and "/" not in image["newName"] for image in overlay["images"])


def test_serve_is_called_as_it_wants_to_be() -> None:
    changed = container("serve")
    assert changed["command"] == ["python", "-m", "dmd2.cli", "serve"]
    command = typer.main.get_command(command_line)
    assert hasattr(command, "commands")
    known = {option for parameter in command.commands["serve"].params for option in parameter.opts}
    given = flags(changed["args"])
    assert set(given) <= known
    assert int(given["--port"]) == changed["ports"][0]["containerPort"]
    assert given["--host"] == "0.0.0.0"
    assert (ROOT / given["--weights"] / "dmd2.json").is_file()
    # Its keys are a file of the secret that the overlay makes, where the container finds it.
    patch = read(KUSTOMIZE / "overlays" / "serve" / "container.yaml")["spec"]["template"]["spec"]
    (mount,), (volume,) = changed["volumeMounts"], patch["volumes"]
    (secret,) = read(KUSTOMIZE / "overlays" / "serve" / "kustomization.yaml")["secretGenerator"]
    assert mount["name"] == volume["name"] and volume["secret"]["secretName"] == secret["name"]
    assert given["--api-key-file"] in [f"{mount['mountPath']}/{file}" for file in secret["files"]]
    for file in secret["files"]:
        ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()
        assert f"/deploy/kustomize/overlays/serve/{file}" in ignored


def test_the_probes_of_serve_are_routes_that_need_no_key() -> None:
    routes = set(create_app({}).openapi()["paths"])
    changed = container("serve")
    paths = {kind: changed[kind]["httpGet"]["path"] for kind in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/healthz", "livenessProbe": "/healthz", "readinessProbe": "/readyz"}
    from dmd2.service.http.guard import OPEN

    assert set(paths.values()) <= routes & set(OPEN)


def test_cog_is_started_by_the_entrypoint_and_asked_what_it_answers() -> None:
    changed = container("cog")
    environment = {each["name"]: each["value"] for each in changed["env"]}
    assert changed["command"] == ["python", "scripts/entrypoint"]
    assert int(environment["PORT"]) == changed["ports"][0]["containerPort"]
    entrypoint = (ROOT / "scripts" / "entrypoint").read_text(encoding="utf-8")
    assert all(f'"{flag}"' in entrypoint for flag in flags(changed["args"]))
    assert {changed[kind]["httpGet"]["path"] for kind in ("startupProbe", "livenessProbe")} == {"/health-check"}
    front = (ROOT / "dmd2" / "service" / "cog" / "front.py").read_text(encoding="utf-8")
    assert '"/health-check"' in front
    source = changed["readinessProbe"]["exec"]["command"]
    assert source[:2] == ["python", "-c"]
    compile(source[2], "probe", "exec")
    assert "/health-check" in source[2] and {"READY", "BUSY"} <= set(re.findall('"([A-Z]+)"', source[2]))


@pytest.mark.parametrize("name", OVERLAYS)
def test_variables_are_read_somewhere(name: str) -> None:
    sources = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "dmd2").rglob("*.py"))
    sources += (ROOT / "scripts" / "entrypoint").read_text(encoding="utf-8")
    for each in [*base()["containers"][0]["env"], *container(name).get("env", [])]:
        assert f'"{each["name"]}"' in sources, each


def test_a_server_has_the_time_that_it_needs_to_end() -> None:
    (original,) = base()["containers"]
    pause = int(original["lifecycle"]["preStop"]["exec"]["command"][-1])
    assert base()["terminationGracePeriodSeconds"] >= server.DRAIN + pause
    budget = read(KUSTOMIZE / "base" / "disruption.yaml")
    assert budget["kind"] == "PodDisruptionBudget" and budget["spec"]["maxUnavailable"] == 1
    assert read(KUSTOMIZE / "base" / "deployment.yaml")["spec"]["replicas"] > budget["spec"]["maxUnavailable"]
    resources = original["resources"]
    assert resources["limits"]["nvidia.com/gpu"] == resources["requests"]["nvidia.com/gpu"]


def test_systemd_starts_what_there_is_and_starts_it_again() -> None:
    unit = configparser.RawConfigParser(strict=False)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read(ROOT / "deploy" / "systemd" / "dmd2.service", encoding="utf-8")
    service = unit["Service"]
    python, *words = shlex.split(service["ExecStart"])
    assert python == f"{service['WorkingDirectory']}/.venv/bin/python" and words[:3] == ["-m", "dmd2.cli", "serve"]
    command = typer.main.get_command(command_line)
    assert hasattr(command, "commands")
    known = {option for parameter in command.commands["serve"].params for option in parameter.opts}
    given = flags(words[3:])
    assert set(given) <= known and (ROOT / given["--weights"] / "dmd2.json").is_file()
    assert server.is_loopback(given["--host"])  # no key is made with it
    assert service["Restart"] == "always" and int(service["RestartSec"]) <= 1
    assert service["RestartPreventExitStatus"] == "2"
    assert int(service["TimeoutStopSec"]) > server.DRAIN
    name, _, value = service["Environment"].partition("=")
    assert name == "DMD2_CACHE" and value == f"/var/cache/{service['CacheDirectory']}"


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="needs kubectl, whose kustomize builds the overlays")
@pytest.mark.parametrize("name", OVERLAYS)
def test_kustomize_builds_it(name: str, tmp_path: Path) -> None:
    shutil.copytree(KUSTOMIZE, tmp_path / "kustomize")
    folder = tmp_path / "kustomize" / "overlays" / name
    for secret in read(folder / "kustomization.yaml").get("secretGenerator", []):
        for file in secret["files"]:
            (folder / file).write_text("a-key-of-sixteen-characters\n")
    built = subprocess.run(
        shlex.split(f"kubectl kustomize {shlex.quote(str(folder))}"), capture_output=True, text=True, timeout=300
    )
    assert built.returncode == 0, built.stderr
    kinds = {document["kind"]: document for document in yaml.safe_load_all(built.stdout)}
    assert {"Deployment", "Service", "PodDisruptionBudget"} <= set(kinds)
    spec = kinds["Deployment"]["spec"]
    (made,) = spec["template"]["spec"]["containers"]
    assert made["command"] == container(name)["command"] and made["resources"] == base()["containers"][0]["resources"]
    assert {volume["name"] for volume in spec["template"]["spec"]["volumes"]} == {
        mount["name"] for mount in made["volumeMounts"]
    }
    labels = kinds["Service"]["spec"]["selector"]
    assert (
        labels == spec["selector"]["matchLabels"] == kinds["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"]
    )


# Grafana


def exported() -> dict[str, set[str]]:
    """Names of samples that /metrics may have → their labels."""
    metrics = Metrics()
    found: dict[str, set[str]] = {}
    for collector, names in metrics.registry._collector_to_names.items():
        labels = set(getattr(collector, "_labelnames", ()))
        for name in names:
            found[name] = labels | ({"le"} if name.endswith("_bucket") else set())
    return {name: labels for name, labels in found.items() if not name.endswith("_created")}


def families() -> set[str]:
    return {family.name for family in Metrics().registry.collect()}


def expressions() -> list[str]:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    asked = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    return asked + [each["query"]["query"] for each in board["templating"]["list"] if each["type"] == "query"]


def test_the_dashboard_asks_for_exactly_the_metrics_that_there_are() -> None:
    asked = {name for expression in expressions() for name in re.findall(r"\bdmd2_\w+", expression)}
    known = exported()
    assert asked <= set(known), asked - set(known)
    suffixes = re.compile(r"_(total|bucket|sum|count)$")
    assert {suffixes.sub("", name) for name in asked} == families()


def test_the_dashboard_asks_for_labels_that_there_are() -> None:
    known, ours = exported(), {"instance"}  # Prometheus' own
    for expression in expressions():
        names = re.findall(r"\bdmd2_\w+", expression)
        labels = set.intersection(*(known[name] for name in names)) | ours
        used = {
            label for inside in re.findall(r"\{([^}]*)\}", expression) for label in re.findall(r"(\w+)=~", inside)
        }
        used |= {label for inside in re.findall(r"by \(([^)]*)\)", expression) for label in inside.split(", ")}
        used |= set(re.findall(r"label_values\(\w+, (\w+)\)", expression))
        assert used <= labels, (expression, used - labels)


def test_the_dashboard_is_whole() -> None:
    board = json.loads(DASHBOARD.read_text(encoding="utf-8"))
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    variables = {each["name"] for each in board["templating"]["list"]}
    used = set(re.findall(r"\$\{?(\w+)", json.dumps(board["panels"]))) - {"__rate_interval"}
    assert used == variables
    for expression in expressions():
        assert expression.count("(") == expression.count(")") and expression.count("{") == expression.count("}")
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(set(places)) == len(places)
