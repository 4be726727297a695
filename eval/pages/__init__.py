"""The HTML pages: one about a training run, one about suites and targets."""
