"""The programs. The only place that knows Hydra."""
