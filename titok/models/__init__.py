"""The models: what is computed, as in the papers."""
