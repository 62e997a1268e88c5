"""An OpenAI-compatible server on the engine: what clients send, what they get, and who may.

Imports common, data and inference, and Starlette and uvicorn, which the extra `serve` installs.
"""
