"""A seeded random tester of every op of `titok.ops`. Each call is compared with a float64 definition.

`python -m random_calls` in the folder tests/ runs it; `--help` lists its options. Call number n of a seed is always the
same call, so that one that failed can be made again alone. `make sanitize` runs it over a build of the C++ ops with
sanitizers, and tests/ops/test_random_calls.py a few hundred calls over the installed one.
"""
