"""Cameras and actions: poses, intrinsics, trajectories, live control, action labels. numpy float64, no torch."""
