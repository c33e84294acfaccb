"""Each distinct piece of a model compiled once, by Inductor."""
