"""The sections of `tools/gpu_check.py`: what has to be proven on a real GPU."""
