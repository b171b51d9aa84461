"""Checks that need an NVIDIA GPU, as one script: `python tests/gpu/run.py`."""

if __name__ == "__main__":
    print("nothing to run: no check needs a GPU yet")
