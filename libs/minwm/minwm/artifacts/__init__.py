"""Where artifacts live: the store and the model registry on it."""
