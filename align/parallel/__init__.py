"""More than one process: layers sharded by FSDP2, and gradients sent as thin matrices."""
