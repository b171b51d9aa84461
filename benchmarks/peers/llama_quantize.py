"""llama.cpp's own quantization of a GGUF, in the environment that `make peers` makes.

python -m benchmarks.peers.llama_quantize SOURCE TARGET LLAMA_FTYPE_...
"""

import sys

import llama_cpp


def main() -> int:
    source, target, kind = sys.argv[1:]
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, kind)
    parameters.nthread = 0  # all
    return llama_cpp.llama_model_quantize(source.encode(), target.encode(), parameters)


if __name__ == "__main__":
    sys.exit(main())
