"""An OpenAI-compatible server: `python -m runtime.serve --bundle DIR`."""
