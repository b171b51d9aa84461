"""The ONNX graph that an engine is built from: where it lies, and what it needs before TensorRT parses it."""

import sys
from dataclasses import dataclass
from pathlib import Path

import onnx

from export.graphs.load import load_graph
from export.graphs.mixed_precision import Kept, cast_embeds, half_graph, is_half
from export.tensorrt.build import Options
from runtime.bundle.engines import engine_folder
from runtime.bundle.manifest import Bundle
from runtime.bundle.verify import file_sha256
from runtime.errors import UserError


@dataclass(frozen=True)
class Source:
    """The ONNX file that an engine comes from.

    Args:
        name: the file's, inside its bundle.
        sha256: hashes of the file and of the weights beside it, by the names that the engine's report gives them.
        folder: where the engine goes.
        embeds_dtype: numpy dtype of the image embeddings that pass from encoder to decoder, whatever the engines
            compute in; None keeps the graph's.
    """

    file: Path
    name: str
    sha256: dict[str, str]
    folder: Path
    embeds_dtype: str | None = None


def source_of(bundle: Bundle, options: Options) -> Source:
    """The bundle's graph for `options`. Raises UserError as `source_graph`."""
    name = source_graph(bundle, options)
    hashes = {file: bundle.files[file]["sha256"] for file in (name, f"{name}.data") if file in bundle.files}
    return Source(
        bundle.path(name),
        name,
        hashes,
        engine_folder(bundle.folder, options.part),
        bundle.decoder.kv_dtype,
    )


def source_of_file(file: Path) -> Source:
    """An ONNX file of no bundle; the engine goes to `engines/` beside it. Raises UserError where it cannot be one."""
    if not file.is_file():
        raise UserError(f"--onnx {file}: no such file")
    names = [path for path in (file, file.with_name(f"{file.name}.data")) if path.is_file()]
    hashes = {path.name: file_sha256(path) for path in names}
    return Source(file, file.name, hashes, file.parent / "engines")


def source_graph(bundle: Bundle, options: Options) -> str:
    """The ONNX file inside the bundle that an engine of `options` comes from.

    Raises UserError where the bundle has none.
    """
    if options.part == "decoder":
        if options.precision != "fp16":
            raise UserError(f"--part decoder builds fp16 engines, not {options.precision}")
        if bundle.decoder.portable_file is None:
            raise UserError(
                f"{bundle.folder} has no decoder of standard operators, and TensorRT cannot parse the fused one; "
                "export it with python -m export.bundle --portable-decoder"
            )
        return bundle.decoder.portable_file
    if options.precision == "fp16":
        return bundle.encoder_file("fp32") or bundle.encoder.file
    file = bundle.encoder_file(options.precision)
    if file is None:
        raise UserError(
            f"{bundle.folder} has no quantised encoder: encoder/{options.precision}.onnx, a Q/DQ graph, is not among "
            "its files"
        )
    return file


def engine_graph(source: Source, options: Options) -> tuple[onnx.ModelProto, list[Kept]]:
    """(the graph that the engine is built from, the nodes that stay in FP32).

    Raises UserError where a quantised engine is asked of a graph without Q/DQ nodes, or a graph is no ONNX or takes
    images of one size.
    """
    model = load_graph(source.file)
    names = {value.name for value in (*model.graph.input, *model.graph.output)}
    if "image_embeds" not in names or (options.part == "encoder") != ("pixel_values" in names):
        raise UserError(f"{source.file}: no {options.part} of this project, it has {', '.join(sorted(names)[:6])}")
    for value in model.graph.input:
        size = [dim.dim_value for dim in value.type.tensor_type.shape.dim[2:]]
        if value.name == "pixel_values" and any(size):
            raise UserError(f"{source.file} takes images of one size, {size}; python -m export.encoder makes others")
    quantised = any(node.op_type == "DequantizeLinear" for node in model.graph.node)
    if quantised != (options.precision != "fp16"):
        found = "has Q/DQ nodes" if quantised else "has no Q/DQ nodes"
        raise UserError(f"{source.file} {found}, so it is no source of a {options.precision} engine")
    if is_half(model):
        print(f"warning: {source.file} is in float16, so nodes that overflow were not searched for", file=sys.stderr)
    model, kept = half_graph(model, options.part)
    if options.part == "decoder":
        _one_sequence(model.graph)
    if source.embeds_dtype:
        cast_embeds(model, source.embeds_dtype)
    return model, kept


def _one_sequence(graph: onnx.GraphProto) -> None:
    """Fix a decoder's batch at 1, all that the runtime asks of it: what has a fixed shape costs the builder nothing."""
    for value in (*graph.input, *graph.output):
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in ("batch", "batch_size"):
                dim.dim_value = 1


def fp32_by_standard(model: onnx.ModelProto) -> list[str]:
    """Nodes with FP16 inputs that ONNX lets compute in FP32 inside (`stash_type`), whatever surrounds them."""
    return [
        node.name
        for node in model.graph.node
        if node.op_type in ("LayerNormalization", "RMSNormalization")
        and all(a.i == onnx.TensorProto.FLOAT for a in node.attribute if a.name == "stash_type")
    ]
