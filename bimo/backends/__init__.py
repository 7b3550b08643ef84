"""Who makes the tokens: see base. OpenMP is told how to wait before any module here imports torch."""

from bimo.runtime import tame_openmp

__all__ = ["tame_openmp"]

tame_openmp()
