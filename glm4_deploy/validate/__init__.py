"""Validate: how much accuracy a bundle loses, where, and whether it passes a gate."""

from glm4_deploy.validate.report import Report
from glm4_deploy.validate.run import ValidateOptions, validate

__all__ = ["Report", "ValidateOptions", "validate"]
