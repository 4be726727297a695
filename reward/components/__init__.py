"""The parts of the composite reward, one a file."""
