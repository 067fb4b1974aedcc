"""A mount under mixed load for long, with its servers killed: python -m tests.soak."""
