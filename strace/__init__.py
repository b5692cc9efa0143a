"""Trace a causal language model, cut compact subgraphs out of it, and run both with one decoder."""
