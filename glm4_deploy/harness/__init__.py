"""lm-evaluation-harness on a bundle, in this process: ``python -m glm4_deploy.harness --model glm4-deploy ...``."""
