"""The contract between exported graphs and the runtime: names of inputs and outputs."""

KINDS = ("key", "value")
NEXT_TOKEN = "next_token"  # the graph's output [1, 1, 1] int64: the likeliest
