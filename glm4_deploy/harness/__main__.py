"""The command line of lm-evaluation-harness with the additional model ``glm4-deploy``.

The harness (0.4.13) does not find models of other packages, so this module registers the model first.
"""

import sys

from glm4_runtime.errors import Glm4Error
from glm4_runtime.install import install_command


def main() -> None:
    try:
        from lm_eval.__main__ import cli_evaluate
        from lm_eval.api.registry import model_registry
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("lm_eval"):
            raise
        sys.exit(f"the harness needs {error.name}: {install_command('eval')}")
    model_registry.register("glm4-deploy", target="glm4_deploy.harness.model:BundleModel")
    try:
        cli_evaluate()
    except Glm4Error as error:
        sys.exit(f"glm4-deploy: {error}")


if __name__ == "__main__":
    main()
