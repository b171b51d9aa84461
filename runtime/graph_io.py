"""The contract between exported graphs and the runtime: names, types and shapes of their inputs and outputs.

Encoder:  pixel_values [B, 3, H, W] -> image_embeds [B, T, D]
Decoder:  input_ids int64 [B, S]              token IDs; -1 - k stands for row k of image_embeds
          image_embeds [N, D]                 all images of the prompt, one after the other; N may be 0
          attention_mask int64 [B, length]    fused graph: ones for the filled positions
          write_indices int64 [B]             portable graph: positions that the KV cache holds
          past_key_values.L.key|value [B, kv_heads, capacity, head_dim]
      ->  logits [B, 1, V]                    of the last position
          next_token int64 [B, 1, 1]          their argmax; bundles of earlier versions lack it
          present.L.key|value                 the same memory as the past, written in place
"""

PIXEL_VALUES = "pixel_values"
IMAGE_EMBEDS = "image_embeds"
INPUT_IDS = "input_ids"
ATTENTION_MASK = "attention_mask"
WRITE_INDICES = "write_indices"
LOGITS = "logits"
NEXT_TOKEN = "next_token"
PAST = "past_key_values"
PRESENT = "present"
KINDS = ("key", "value")


def cache_name(side: str, layer: int, kind: str) -> str:
    """Name of one KV-cache tensor. side: `PAST` or `PRESENT`; kind: one of `KINDS`."""
    return f"{side}.{layer}.{kind}"
