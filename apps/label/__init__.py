"""`plumbline label`: the labelling app, from its database to the next reward model."""
