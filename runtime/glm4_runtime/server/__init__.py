"""A bundle behind OpenAI's API, by FastAPI and uvicorn."""

from glm4_runtime.server.options import ServerOptions, read_api_keys

__all__ = ["ServerOptions", "read_api_keys"]
