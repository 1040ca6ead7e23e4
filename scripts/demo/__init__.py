"""The main job on real input: `python -m scripts.demo`."""
