"""Checkpoints: their files, the base class that loads and saves models, and the layout of the official ones."""
