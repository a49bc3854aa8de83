"""Triton device code and launchers, one module per op; installed as `titok.kernels`.

A module here imports triton and torch alone. Its launcher takes checked tensors and preallocated outputs,
and nothing else: checks, allocation, registration and the choice of back end live in `titok.ops`.
"""
