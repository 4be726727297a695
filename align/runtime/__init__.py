"""What every stage runs on: launching, run folders, checkpoints, optimizers, metrics."""
