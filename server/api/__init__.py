"""The OpenAI-compatible HTTP API: protocol types, errors, and one file per endpoint."""
