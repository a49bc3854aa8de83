"""Installs as `titok.kernels`, not as `kernels`: a top-level module of that name belongs to another package.

The folder holds the Triton kernels and their launchers, one module per op. A launcher takes tensors that are already
checked and outputs that are already allocated; it allocates its own scratch memory. Argument checks, registration with
PyTorch and the choice of a back end are in `titok.ops`. The modules here import torch and triton, nothing of titok
outside this folder.

Every launcher takes its tensors in the order of the op's arguments, then the outputs, and names them alike:

    x, residual        inputs of a norm              total              x + residual, rounded to its dtype
    grad               gradient of the op's result   grad_total         gradient of `total`
    weight, bias       affine parameters (C,), (D,)  normalised         result of a norm
    mean, rstd         statistics of a norm          out, lse           result and log-sum-exp of attention
    num_heads, num_groups, eps, scale                numbers
    None               for an optional tensor that is absent; the kernel is compiled without it

Files:

    _launch.py    launches every kernel, or records the launch
    _aot.py       what a module tells `python -m titok.kernels.aot` to compile
    _spills.py    which kernels may spill registers, and why
    _tuning.py    tile sizes, warps and pipeline stages of every kernel
    aot.py        compiles recorded launches for GPUs that are not present and checks the machine code
    RESOURCES.md  the table that it writes
"""
