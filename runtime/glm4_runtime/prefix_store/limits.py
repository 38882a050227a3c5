"""Sizes of the prefix cache on disk."""

DEFAULT_BYTES = 20 * 10**9
# Shorter prompts are not stored: to compute them takes a few steps, and most prompts are short and never come back.
LEAST_TOKENS = 256
