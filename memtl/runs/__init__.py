"""One training run: a network and data by name, settings in, a folder of results out."""
