"""How inference computes fast: prepared weights, oneDNN, folded upsampling, CUDA graphs, and memory kept between
calls.

Nothing here knows of the papers' models; `titok.models` and `titok.generation` use it.
"""
