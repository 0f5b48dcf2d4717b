"""Evaluation: does the camera control the world, how near do its pictures come to true ones, and the report of it."""
