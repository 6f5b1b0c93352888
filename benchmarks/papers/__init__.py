"""The experiments of the papers: ``python -m benchmarks.papers list | run NAME --outdir DIR | report DIR``."""
