"""optimum-onnx's own float32 export of a Llama, in the environment that `make peers` gives it.

python -m benchmarks.peers.optimum_export SOURCE OUT [OPSET]
"""

import sys


def main() -> None:
    from optimum.exporters.onnx import main_export

    source, out, *opset = sys.argv[1:]
    options = {"opset": int(opset[0])} if opset else {}
    main_export(source, output=out, task="text-generation-with-past", do_validation=False, **options)


if __name__ == "__main__":
    main()
