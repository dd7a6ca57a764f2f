"""Directions, differences, step size, reconstruction, quality: estimators of pullbacks, independent of graphs."""
