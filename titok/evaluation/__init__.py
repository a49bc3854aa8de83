"""Measuring tokenizers and generators: distances of sets of pictures, quality of reconstructions, use of codes, probes.

Nothing here imports training or generation. See docs/evaluation.md.
"""
