"""Rows of the comparison at the released size: what is said of each piece of work, and of peers that cannot take part.

A row has `work` (export, load, encoder, prefill, decode, first_token), `peer`, `format` (of our decoder, or what runs
our encoder), `metric`, `ours`, `theirs`, `ratio` (above 1: we are ahead), and peak memory of both: `peak_mib`
as `benchmarks.memory` counts it, `mapped_mib` of files' pages. A missing one has a `reason` in place of figures.
"""

from collections.abc import Collection, Mapping, Sequence

from benchmarks.peers.products import GGUF_FORMATS, Cost
from benchmarks.peers.turns import compared, not_installed

KEYS = (  # noqa: SIM905 - a literal would take twenty lines
    "work peer format context metric ours theirs ratio ratio_least ratio_most limit reached perplexity peer_perplexity "
    "anls peer_anls peak_mib peer_peak_mib mapped_mib peer_mapped_mib reason"
).split()
# peer -> in what OpenVINO computes; None leaves the rest of an INT8 graph to it
ENCODERS = {"openvino-fp32": "f32", "openvino-bf16": "bf16", "openvino-int8": None}
GGUF_PEERS = {f"llama.cpp-{form}": form for form in GGUF_FORMATS}
DECODERS = (*GGUF_PEERS, "transformers-bf16")
PEERS = (*ENCODERS, *DECODERS)
WORKS = ("export", "load", "encoder", "prefill", "decode", "first_token")
WORKS_OF_DECODERS = ("prefill", "decode")
# of the processor, one of which OpenVINO computes bfloat16 with
BF16_INSTRUCTIONS = ("avx512_bf16", "amx_bf16")


def missing(peer: str, works: Collection[str], reason: str) -> list[dict]:
    """The rows of a peer that cannot take part."""
    own = ("encoder",) if peer in ENCODERS else WORKS_OF_DECODERS
    return [{"work": work, "peer": peer, "reason": reason} for work in own if work in works]


def complete(row: dict) -> dict:
    """The row with all KEYS; "" is what it does not say."""
    return dict.fromkeys(KEYS, "") | row


def why_not(peer: str, instructions: Collection[str], weights_gb: float, free_gb: float) -> str | None:
    """Why a peer cannot take part here; None if it can.

    Args:
        instructions: those of the processor, as Linux names them.
        weights_gb: of the language model in 16 bits. free_gb: memory that is left beside our decoders.
    """
    library = peer.split("-")[0] if peer in ENCODERS else peer
    if how := not_installed(library):
        return how
    if peer == "openvino-bf16" and not set(BF16_INSTRUCTIONS) & set(instructions):
        return f"the processor has none of {', '.join(BF16_INSTRUCTIONS)}"
    if peer == "transformers-bf16" and weights_gb > free_gb:
        return f"{weights_gb:.1f} GB of weights, {free_gb:.1f} GB of memory are left for them"
    return None


def row(work: str, peer: str, form: str, context: object, own: list[dict], other: list[dict], amount=None) -> dict:
    """own, other: answers with `seconds`, `own_mib`, `mapped_mib`. amount: of steps, for a rate; None: milliseconds."""
    found = {"work": work, "peer": peer, "format": form, "context": context}
    found |= {"metric": "tokens/s" if amount else "ms", **compared(own, other, amount)}
    for prefix, answers in (("", own), ("peer_", other)):
        found[f"{prefix}peak_mib"] = max(answer["own_mib"] for answer in answers)
        found[f"{prefix}mapped_mib"] = max(answer["mapped_mib"] for answer in answers)
    return found


def export_row(peer: str, form: str, own: Cost, other: Cost) -> dict:
    """Ours has the encoder, its comparison with PyTorch and the decoder's; the peer's is the language model alone."""
    found = {"work": "export", "peer": peer, "format": form, "context": "", "metric": "s"}
    found |= {"ours": own.seconds, "theirs": other.seconds, "ratio": round(other.seconds / own.seconds, 2)}
    found |= {"peak_mib": own.own_mib, "mapped_mib": own.mapped_mib}
    return found | {"peer_peak_mib": other.own_mib, "peer_mapped_mib": other.mapped_mib}


def fastest(rows: Sequence[Mapping], work: str, names: Collection[str], own: bool = False) -> str | None:
    """The peer that took least for `work`, by the sum of its contexts; None where no row has figures.

    own: of our formats in place of peers.
    """
    key, value = ("format", "ours") if own else ("peer", "theirs")
    taken: dict[str, dict[object, float]] = {}
    for found in rows:
        if found["work"] == work and found.get(key) in names and value in found:
            taken.setdefault(found[key], {}).setdefault(found["context"], found[value])
    return min(taken, key=lambda name: sum(taken[name].values()), default=None)


def quality(form: str, measured: Sequence[Mapping]) -> dict[str, float]:
    """What a decoder's format loses on the demo model: `perplexity` of text and `anls`; empty where nobody measured it.

    measured: rows of benchmarks/results/decoder_weights.json, of which those by our kernels come first.
    """
    method = {"int4": "q4_1", "int4-gptq": "gptq"}.get(form, form)
    found = [row for row in measured if row["precision"] == "int4" and row["method"] == method]
    best = sorted(found, key=lambda row: row["operators"] != "kernels")[:1]
    return {"perplexity": best[0]["text_perplexity"], "anls": best[0]["anls"]} if best else {}
