"""Looking at checkpoints and converting them, on one process without a trainer or an accelerator."""
