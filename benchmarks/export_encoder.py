"""What exporting the released size costs: ConvNeXt-L with its fifth stage and projector, at 1536.

    python -m benchmarks.export_encoder

Writes a checkpoint of random weights under build/ (2.8 GB), runs `python -m export.encoder --res 1536` on it and
records wall time and peak memory (`benchmarks.memory`). Limits: 3 minutes and 4 GiB on two cores.
"""

import sys
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks import record
from benchmarks.memory import GIB, run_measured
from train.model import (
    Checkpoint,
    ConvLLaVA,
    ConvNeXtEncoder,
    EncoderConfig,
    ImageEncoder,
    build_projector,
    save_checkpoint,
)

ROOT = Path(__file__).parents[1]
RESOLUTION = 1536
MAX_SECONDS, MAX_GIB = 180, 4
# Vicuna-7B's width, so that the projector has the released size; one thin layer and a few words stand in for the rest
LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}


def random_checkpoint(folder: Path) -> Path:
    """The released encoder's shape with random weights, in the released layout; made once (2.8 GB)."""
    if not folder.is_dir():
        torch.manual_seed(0)
        config = EncoderConfig.from_variant("large", (6, 3072), layer_scale=0.5)
        projector = build_projector("mlp2x_gelu", config.widths[-1], LLAMA["hidden_size"])
        image_encoder = ImageEncoder(ConvNeXtEncoder(config), projector)
        model = ConvLLaVA(image_encoder, LlamaForCausalLM(LlamaConfig(**LLAMA)))
        llava = {"model_type": "llava_llama", "mm_projector_type": "mlp2x_gelu", "mm_vision_resolution": RESOLUTION}
        vision = {"model_type": "convnext", "depths": config.depths, "hidden_sizes": config.widths}
        vision["layer_scale_init_value"] = config.layer_scale
        like = Checkpoint(folder, folder, LLAMA | llava, vision, {"crop_size": RESOLUTION})
        save_checkpoint(model, like, folder, torch.float32)
    return folder


def main() -> None:
    checkpoint = random_checkpoint(ROOT / "build" / "random-large")
    out = ROOT / "build" / "encoder" / checkpoint.name
    rows = []
    for precision in ("fp32", "fp16"):
        command = [sys.executable, "-m", "export.encoder", "--res", str(RESOLUTION), "--precision", precision]
        command += ["--checkpoint", str(checkpoint), "--out", str(out)]
        ran = run_measured(command, capture=False, cwd=ROOT)
        rows.append(
            {
                "precision": precision,
                "exit_status": ran.status,
                "seconds": round(ran.seconds, 1),
                "peak_memory_gib": round(ran.peak.own / GIB, 2),
                "files_gb": round(sum(file.stat().st_size for file in out.glob(f"{precision}*")) / 1e9, 2),
            }
        )
        print(rows[-1], flush=True)
    record.write("export_encoder", rows)
    if any(row["exit_status"] or row["seconds"] > MAX_SECONDS or row["peak_memory_gib"] > MAX_GIB for row in rows):
        sys.exit(f"an export failed or went over {MAX_SECONDS} s or {MAX_GIB} GiB")


if __name__ == "__main__":
    main()
