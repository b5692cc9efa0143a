"""Serve a model and its subgraphs over an OpenAI-compatible HTTP API."""
