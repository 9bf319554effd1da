"""Training: the LightningModule, metrics, optimizers, checkpoints and callbacks."""
