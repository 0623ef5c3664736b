"""Small results of every part that has a version, so that none changes in silence: ``python -m tests.pins``."""
