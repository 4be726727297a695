"""What trains the classifier heads and the entailment head, with their data and their card. No other room imports it."""
