"""Pictures and tokens on disk."""
