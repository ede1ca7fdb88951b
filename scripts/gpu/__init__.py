"""What scripts/gpu_verify.py is made of. Standard library only, but for `checkpoints` and `link`, which run apart."""
