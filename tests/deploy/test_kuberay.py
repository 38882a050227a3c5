"""The manifest for KubeRay: options that exist, versions that are pinned, pods that Kubernetes' schema allows."""

import re
import shlex
from pathlib import Path

import click
import pytest
import yaml

from glm4_deploy.commands.serve import command

ROOT = Path(__file__).parents[2]
CLUSTER, FRONT, SERVICE = yaml.safe_load_all((ROOT / "deploy/kuberay.yaml").read_text())


def pods():
    """The pod specifications by name."""
    workers = {group["groupName"]: group["template"]["spec"] for group in CLUSTER["spec"]["workerGroupSpecs"]}
    head = CLUSTER["spec"]["headGroupSpec"]["template"]["spec"]
    return {"head": head, **workers, "front": FRONT["spec"]["template"]["spec"]}


def test_the_server_gets_options_that_exist():
    (container,) = pods()["front"]["containers"]
    words = shlex.split(container["args"][0].partition("exec glm4-deploy serve ")[2])
    context = click.Context(command)
    parsed, rest, _ = command.make_parser(context).parse_args(list(words))
    assert (rest, parsed["bundle"]) == ([], "/bundle")
    assert int(parsed["replicas"]) == sum(group["replicas"] for group in CLUSTER["spec"]["workerGroupSpecs"])
    assert parsed["ray_address"] == f"{CLUSTER['metadata']['name']}-head-svc:6379"


def test_ray_has_the_version_that_is_pinned():
    pinned = re.search(r"^ray==(\S+)$", (ROOT / "constraints.txt").read_text(), re.M)
    assert CLUSTER["spec"]["rayVersion"] == pinned[1]


@pytest.mark.parametrize("name", ["head", "replicas", "front"])
def test_every_pod_has_the_secret_and_a_user(name):
    pod = pods()[name]
    (container,) = pod["containers"]
    env = {each["name"]: each for each in container["env"]}
    assert env["RAY_AUTH_MODE"]["value"] == "token"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "glm4-ray"
    assert pod["securityContext"]["runAsUser"] == 1000
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert SERVICE["spec"]["selector"] == FRONT["spec"]["template"]["metadata"]["labels"]


@pytest.mark.more
@pytest.mark.parametrize("name", ["head", "replicas", "front"])
def test_every_pod_fits_kubernetes_schema(name):
    kubernetes = pytest.importorskip("kubernetes_validate")
    pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": pods()[name]}
    kubernetes.validate(pod, "1.30", strict=True)
    for whole in (FRONT, SERVICE):
        kubernetes.validate(whole, "1.30", strict=True)
