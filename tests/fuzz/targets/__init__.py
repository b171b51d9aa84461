"""What is fuzzed: a module each, with `fuzz(content)`, `seeds()` and, where bytes have a structure, `mutate`."""

# Packages whose Python code reports what it covers; atheris takes them whole, and torch would take minutes
INSTRUMENTED = ["PIL", "export", "runtime", "train"]
TARGETS = ("image", "body", "data_url", "manifest", "safetensors", "torch_file", "sentencepiece")
