"""Safety scanners and, later, the pipeline around a model. Usable without any training code."""
