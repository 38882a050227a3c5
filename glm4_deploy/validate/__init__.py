"""Validate: how much worse than its checkpoint is a bundle, where, and may it ship?"""

from glm4_deploy.validate.report import Report
from glm4_deploy.validate.run import ValidateOptions, validate

__all__ = ["Report", "ValidateOptions", "validate"]
