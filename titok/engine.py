"""Public switches of inference: the plain path, and the memory that generation keeps."""

from titok.inference.memory import release_memory
from titok.inference.prepared import plain

__all__ = ["plain", "release_memory"]
