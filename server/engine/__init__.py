"""The decode engine: sequences, cache blocks, schedule, draft and verify. It knows no HTTP."""
