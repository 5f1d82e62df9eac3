"""Options that several commands share, each declared once."""

from pathlib import Path
from typing import Annotated

import typer

DEFAULT_MODEL = "smollm2-135m"

Model = Annotated[
    str,
    typer.Option("--model", help="Alias, local directory, Hugging Face hub id or GGUF file.", metavar="MODEL"),
]
KV = Annotated[
    str,
    typer.Option(
        "--kv",
        help="How the KV cache is held: 'none' (dense) or a method, 'zeroc(bits=4)'.",
        metavar="METHOD",
    ),
]
KVMemory = Annotated[
    str, typer.Option("--kv-memory", help="Memory for KV pages, such as 1GiB or 512MiB.", metavar="SIZE")
]
Dtype = Annotated[
    str, typer.Option("--dtype", help="Weights and activations: auto, bfloat16 or float32.", metavar="DTYPE")
]
Weights = Annotated[
    str,
    typer.Option("--weights", help="Packed weights: auto (none), bfloat16, int8 or int4.", metavar="FORMAT"),
]
Calibration = Annotated[
    Path | None,
    typer.Option("--calibration", help="File written by `kvfold calibrate` (default: the model's own)."),
]
From = Annotated[float, typer.Option("--from", help="Where to begin in the text, as a fraction of it.")]
To = Annotated[float, typer.Option("--to", help="Where to end in the text, as a fraction of it.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on stdout.")]
