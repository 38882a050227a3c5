"""OpenAI's Responses API over the chat planner: requests become chat requests, and deltas become items."""
