"""``python -m glm4_deploy``, where the script is not on the path."""

from glm4_deploy.cli import main

main()
