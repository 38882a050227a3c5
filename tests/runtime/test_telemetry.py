"""Nothing that we use sends anything anywhere of its own accord."""

import os
import subprocess
import sys

import pytest

CODES = {
    "runtime": "from glm4_runtime import Session\nwith Session.open({bundle!r}) as session:\n    session.prefill(0, [1, 2])",
    "exporters": "import glm4_exporters.pieces",
    "command": "from glm4_deploy.cli import main\nmain(['doctor'])",
}


def traces_of(folder):
    return [str(path.relative_to(folder)) for path in folder.rglob("*") if "icrosoft" in str(path)]


def run(code, home, **environment):
    """Run code with a home folder of its own, where ONNX Runtime would keep the id of this machine."""
    variables = {name: value for name, value in os.environ.items() if name != "ORT_DISABLE_TELEMETRY"}
    variables |= {"HOME": str(home), "XDG_CACHE_HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=variables | environment, capture_output=True, text=True, timeout=120
    )
    assert "Traceback" not in done.stderr, done.stderr


@pytest.mark.parametrize("place", CODES)
def test_onnxruntime_makes_no_id_of_this_machine(place, tmp_path, demo_bundle):
    run(CODES[place].format(bundle=str(demo_bundle)), tmp_path)
    assert traces_of(tmp_path) == []


def test_whoever_wants_onnxruntimes_events_may_have_them(tmp_path):
    """The variable is only set where it is not. On a version without events there is nothing to see."""
    code = "import glm4_runtime, os\nassert os.environ['ORT_DISABLE_TELEMETRY'] == '0'"
    run(code, tmp_path, ORT_DISABLE_TELEMETRY="0")
