"""Drafts: guesses of the next tokens, which the model verifies in one run, and the decision whether they pay.

``drafter.py`` is the interface. ``lookup.py`` and ``model.py`` implement it. ``drafting.py`` chooses widths, from the
chances in ``chance.py`` and the costs in ``costs.py``.
"""

from glm4_runtime.scheduler.drafts.drafter import Draft, Drafter, Offer
from glm4_runtime.scheduler.drafts.drafting import Drafting

__all__ = ["Draft", "Drafter", "Drafting", "Offer"]
