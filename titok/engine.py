"""Public switches of inference: `plain` turns the fast path off, `release_memory` frees what generation keeps."""

from titok.inference.memory import release_memory
from titok.inference.prepared import plain

__all__ = ["plain", "release_memory"]
