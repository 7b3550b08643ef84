"""The architectures. OpenMP is told how to wait before any module here imports torch (see runtime.tame_openmp)."""

from bimo.runtime import tame_openmp

__all__ = ["tame_openmp"]

tame_openmp()
