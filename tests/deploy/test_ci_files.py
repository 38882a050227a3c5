"""The templates for CI systems: their structure, and their commands run here as the systems would."""

import os
import re
import subprocess
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "docs" / "ci"
ACTION = yaml.safe_load((FOLDER / "github-action" / "action.yml").read_text("utf-8"))
GITLAB = yaml.safe_load((FOLDER / "gitlab.yml").read_text("utf-8"))
WORKFLOW = yaml.safe_load((FOLDER / "github-workflow.yml").read_text("utf-8"))
SCRIPT = FOLDER / "export-and-validate.sh"


def variables_of_script():
    """Names of environment variables that the script reads, with their defaults."""
    return dict(re.findall(r"\$\{([A-Z]+):-(\w+)\}", SCRIPT.read_text("utf-8")))


def test_both_templates_run_the_script_with_its_variables():
    assert variables_of_script().keys() == {"TARGET", "PRECISION", "GATE", "KEY"}
    step = ACTION["runs"]["steps"][-1]
    assert "export-and-validate.sh" in step["run"]
    assert variables_of_script().keys() <= step["env"].keys()
    assert "docs/ci/export-and-validate.sh" in GITLAB["bundle"]["script"][0]
    assert variables_of_script().keys() <= GITLAB["bundle"]["variables"].keys()


def test_the_actions_defaults_are_the_scripts():
    for name in ("target", "precision", "gate"):
        assert ACTION["inputs"][name]["default"] == variables_of_script()[name.upper()]
        assert GITLAB["bundle"]["variables"][name.upper()] == variables_of_script()[name.upper()]


def test_every_input_that_the_action_uses_exists():
    used = set(
        re.findall(
            r"\$\{\{ inputs\.([\w-]+) \}\}", (FOLDER / "github-action" / "action.yml").read_text("utf-8")
        )
    )
    assert used == ACTION["inputs"].keys()
    wanted = {name for name, each in ACTION["inputs"].items() if each.get("required")}
    given = WORKFLOW["jobs"]["bundle"]["steps"][1]["with"]
    assert wanted <= given.keys() <= ACTION["inputs"].keys()
    assert (ROOT / WORKFLOW["jobs"]["bundle"]["steps"][1]["uses"] / "action.yml").exists()


def test_the_actions_key_step(tmp_path):
    step = next(each for each in ACTION["runs"]["steps"] if each.get("id") == "key")
    output = tmp_path / "output"
    done = subprocess.run(
        ["bash", "-e", "-c", step["run"]],
        env=os.environ
        | {"CHECKPOINT": str(ROOT / "demo" / "glm4-tiny"), "TARGET": "ort", "PRECISION": "int8"}
        | {"GITHUB_OUTPUT": str(output), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"key=[0-9a-f]{64}\n", output.read_text("utf-8"))


def test_the_script_ends_with_the_gates_exit_code(tmp_path):
    """A gate that no bundle passes ends the script with 3. ``.ci/run`` runs the script with the default gate."""
    gate = tmp_path / "gate.toml"
    gate.write_text("[int8]\nkl_mean = 1e-12\n", "utf-8")
    found = subprocess.run(
        ["bash", str(SCRIPT), str(ROOT / "demo" / "glm4-tiny"), str(tmp_path / "bundle")],
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "GATE": str(gate)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 3, found.stdout + found.stderr
    assert "failed: kl_mean" in found.stderr
    assert (tmp_path / "bundle.junit.xml").exists()
