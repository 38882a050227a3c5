"""Anthropic's Messages API over the chat planner: requests become chat requests, and deltas become content blocks."""
