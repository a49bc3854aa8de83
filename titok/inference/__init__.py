"""How inference computes fast: prepared weights, oneDNN, folded upsampling, CUDA graphs, memory that is kept.

Nothing here knows of the papers' models; `titok.models` and `titok.generation` use it.
"""
