"""What the labels say: agreement, annotators, models, and their plot."""
