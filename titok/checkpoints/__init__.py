"""Reading and writing models, and everything that the official checkpoints demand."""
