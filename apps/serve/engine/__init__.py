"""Where answers come from: a model on this machine in one batch for all requests, or another server."""
