"""The trainings of the embedded assets, started by ``python -m experiments.train_tiny``."""
