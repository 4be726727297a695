"""What the stages read: rows and the forms they come in, curation, duplicates, mixtures of domains."""
