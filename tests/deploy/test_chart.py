"""The Helm chart: Helm's own library lints and renders it, and Kubernetes' schemas check what comes out."""

import re
from pathlib import Path

import click
import pytest
import yaml

from glm4_deploy.commands.serve import command

CHART = Path(__file__).parents[2] / "deploy/helm/glm4-deploy"
KUBERNETES = "1.30"
SERVED = {"bundle": {"claim": "bundles"}, "apiKeysSecret": "keys"}
HUB = {
    "bundle": {"hub": {"name": "owner/name", "revision": "v1", "tokenSecret": "hub"}},
    "apiKeysSecret": "keys",
}
VALUES = {
    "claim": SERVED,
    "path": {"bundle": {"claim": "bundles", "path": "a/b"}, "allowAnonymous": True},
    "hub": HUB,
    "monitored": SERVED
    | {"serviceMonitor": {"enabled": True, "keySecret": "one", "labels": {"release": "x"}}},
    "all": SERVED
    | {
        "replicas": 3,
        "image": {"repository": "host/glm4", "tag": "cuda", "pullSecrets": [{"name": "registry"}]},
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "24Gi"}, "requests": {"cpu": "4"}},
        "strategy": {"type": "Recreate"},
        "extraArgs": ["--max-queue", "128"],
        "env": [{"name": "OTEL_SERVICE_NAME", "value": "chat"}],
        "traces": "http://collector:4318",
        "podAnnotations": {"a": "b"},
        "podLabels": {"c": "d"},
        "runtimeClassName": "nvidia",
        "nodeSelector": {"disk": "fast"},
        "tolerations": [{"key": "gpu", "operator": "Exists"}],
        "affinity": {"nodeAffinity": {}},
        "drainTimeout": 100,
    },
}


@pytest.fixture(scope="module")
def helm():
    return pytest.importorskip(
        "helm_python", reason="Helm's library is not installed; make test-more installs it"
    )


@pytest.fixture
def rendered(helm):
    """A function: the objects that the chart makes of these values, by their kinds."""

    def render(values):
        with helm.Chart.load(str(CHART)) as chart:
            found = chart.render(values, name="demo", namespace="models")
        texts = [text for name, text in found.items() if name.endswith(".yaml") and text.strip()]
        return {one["kind"]: one for one in map(yaml.safe_load, texts)}

    return render


def container(objects):
    (found,) = objects["Deployment"]["spec"]["template"]["spec"]["containers"]
    return found


@pytest.mark.more
def test_helm_finds_nothing(helm):
    found = helm.lint(str(CHART), SERVED)
    assert found["errors"] == []
    assert [one["error"] for one in found["messages"]] == ["icon is recommended"]


@pytest.mark.more
@pytest.mark.parametrize("name", VALUES)
def test_each_object_fits_kubernetes_schema(rendered, name):
    kubernetes = pytest.importorskip("kubernetes_validate")
    objects = rendered(VALUES[name])
    for kind, found in objects.items():
        if kind != "ServiceMonitor":  # of the Prometheus operator
            kubernetes.validate(found, KUBERNETES, strict=True)
    assert set(objects) == {"Deployment", "Service"} | ({"ServiceMonitor"} if name == "monitored" else set())


@pytest.mark.more
@pytest.mark.parametrize("name", VALUES)
def test_the_arguments_are_options_of_serve(rendered, name):
    arguments = container(rendered(VALUES[name]))["args"]
    assert arguments[0] == "serve"
    with click.Context(command) as context:
        command.make_parser(context).parse_args(list(arguments[1:]))


@pytest.mark.more
def test_a_pod_has_few_rights_and_enough_time(rendered):
    objects = rendered(VALUES["all"])
    pod = objects["Deployment"]["spec"]["template"]["spec"]
    assert pod["securityContext"]["runAsUser"] == 1000
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["automountServiceAccountToken"] is False
    assert pod["terminationGracePeriodSeconds"] > 100
    rights = container(objects)["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    assert labels["c"] == "d"


@pytest.mark.more
def test_a_bundle_comes_from_a_claim_or_from_the_hub(rendered):
    mounted, loaded = rendered(VALUES["path"]), rendered(HUB)
    assert container(mounted)["volumeMounts"] == [
        {"name": "bundle", "mountPath": "/bundle", "subPath": "a/b", "readOnly": True}
    ]
    assert container(loaded)["volumeMounts"] == [{"name": "cache", "mountPath": "/cache"}]
    assert container(loaded)["args"][1] == "owner/name"
    assert [one["name"] for one in container(loaded)["env"]] == ["GLM4_API_KEYS", "HF_TOKEN"]
    assert "env" not in container(mounted)


@pytest.mark.more
@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"apiKeysSecret": "keys"}, "set bundle.claim or bundle.hub.name"),
        ({"bundle": {"claim": "a", "hub": {"name": "b/c"}}, "apiKeysSecret": "keys"}, "not both"),
        ({"bundle": {"claim": "a"}}, "set apiKeysSecret, or allowAnonymous: true"),
        (SERVED | {"allowAnonymous": True}, "not both"),
        (SERVED | {"serviceMonitor": {"enabled": True}}, "set serviceMonitor.keySecret"),
    ],
)
def test_values_that_cannot_be_served_are_refused(helm, rendered, values, said):
    with pytest.raises(helm.HelmError, match=re.escape(said)):
        rendered(values)


def test_the_charts_version_is_the_packages():
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    project = (CHART.parents[2] / "pyproject.toml").read_text()
    assert f'\nversion = "{chart["appVersion"]}"\n' in project
