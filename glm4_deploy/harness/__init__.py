"""Runs lm-evaluation-harness on a bundle: ``python -m glm4_deploy.harness --model glm4-deploy ...``."""
