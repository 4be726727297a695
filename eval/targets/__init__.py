"""What is evaluated: weights, adapters, run folders, endpoints, recorded answers, functions, guarded models."""
