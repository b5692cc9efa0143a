"""Settings for every test: no hub, and hypothesis without a clock."""

from __future__ import annotations

import os

import hypothesis

# Before transformers is imported. A test that wants the network is a mistake and shall fail at once.
os.environ["HF_HUB_OFFLINE"] = "1"

# The first call of a torch kernel is slow whatever the example; pytest-timeout bounds the test as a whole.
hypothesis.settings.register_profile("strace", deadline=None)
hypothesis.settings.load_profile("strace")
