"""Named ranges around every stage, decoding step and op, for Nsight (NVTX) and for `torch.profiler`.

Off unless asked for, by `TITOK_NVTX=1` in the environment or `with profiling.enabled():`; then a range costs one test
of a global. `benchmarks.profile` uses them. The code lies under `titok.ops`, which imports nothing above itself.
"""

from titok.ops._ranges import DOMAIN, NVTX, Sink, TorchProfiler, annotate, each, enabled, ranged

__all__ = ["DOMAIN", "NVTX", "Sink", "TorchProfiler", "annotate", "each", "enabled", "ranged"]
