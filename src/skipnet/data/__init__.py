"""Images for training and evaluation: sources, whole-batch augmentation, stateless loaders."""
