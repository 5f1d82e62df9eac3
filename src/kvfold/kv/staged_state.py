"""What staged tables hold beside their pages, as bytes: attention received, records of queries, coordinates."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from kvfold.kv.frame import KINDS, Basis
from kvfold.kv.staged_tables import QueryRecord, StagedTables

SIDES = ("key", "value")


def dump_state(tables: StagedTables, shared: Sequence[Basis]) -> bytes:
    """One safetensors file. shared: coordinates that the receiver has too (`Encoder.shared`), which are only named.

    Of the watches those of the tables' own layout are kept, what other lanes wanted to know is not.
    """
    tensors: dict[str, Tensor] = {}
    width = [int(rows.max(initial=0)) for rows in tables.rows]
    for number, watch in enumerate(tables.layout.watches):
        for track, mass in enumerate(tables.mass[watch]):
            if mass.any():
                tensors[f"mass.{number}.{track}"] = mass[:, : width[track]].contiguous()
    for name, record in tables.records.items():
        tensors |= {f"record.{name}.{field}": value.contiguous() for field, value in record.state.items()}
    # Classes may share a frame.
    own = {id(f): f for basis in tables.bases if basis is not None for f in (basis.key, basis.value) if f is not None}
    numbers = {key: number for number, key in enumerate(own)}
    frames = [_dump_frame(frame, number, shared, tensors) for number, frame in enumerate(own.values())]
    bases = [
        None if basis is None else [None if f is None else numbers[id(f)] for f in (basis.key, basis.value)]
        for basis in tables.bases
    ]
    meta = {"settled": tables.settled, "records": list(tables.records), "frames": frames, "bases": bases}
    return save(tensors, {"state": json.dumps(meta)})


def load_state(
    data: bytes, tables: StagedTables, shared: Sequence[Basis], records: Mapping[str, Callable[[], QueryRecord]]
) -> None:
    """Gives tables whose rows are set what `dump_state` made. records: makers of the records that they may have.

    Raises ValueError where the bytes do not belong to such tables.
    """
    try:
        tensors = load(data)
        length = int.from_bytes(data[:8], "little")
        meta = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["state"])
        layout = tables.layout
        for number, watch in enumerate(layout.watches):
            for track, rows in enumerate(tables.rows):
                zeros = torch.zeros(layout.heads, int(rows.max(initial=0)))
                tables.mass[watch][track] = tensors.get(f"mass.{number}.{track}", zeros)
        tables.records = {name: records[name]() for name in meta["records"]}
        for name, record in tables.records.items():
            for field, value in record.state.items():
                value.copy_(tensors[f"record.{name}.{field}"])
        frames = [_load_frame(spec, number, shared, tensors) for number, spec in enumerate(meta["frames"])]
        tables.bases = [
            None if pair is None else Basis(*(None if n is None else frames[n] for n in pair)) for pair in meta["bases"]
        ]
        tables.settled = meta["settled"]
    except (SafetensorError, KeyError, IndexError, TypeError, RuntimeError) as error:
        raise ValueError(f"this is not the state of such a sequence ({error})") from error


def _place(frame: Any, shared: Sequence[Basis]) -> list[Any] | None:
    """[class, side] of a frame that all sequences have in common, None of any other."""
    places = ([number, side] for number, basis in enumerate(shared) for side in SIDES if getattr(basis, side) is frame)
    return next(places, None)


def _dump_frame(frame: Any, number: int, shared: Sequence[Basis], tensors: dict[str, Tensor]) -> dict[str, Any]:
    place = _place(frame, shared)
    if place is not None:
        return {"shared": place}
    numbers: dict[str, Any] = {}
    inner: dict[str, Any] = {}
    for field in fields(frame):
        value = getattr(frame, field.name)
        if isinstance(value, Tensor):
            tensors[f"frame.{number}.{field.name}"] = value.contiguous()
        elif type(value).__name__ in KINDS:
            inner[field.name] = _place(value, shared)
        else:
            numbers[field.name] = value
    return {"kind": type(frame).__name__, "numbers": numbers, "inner": inner}


def _load_frame(spec: dict[str, Any], number: int, shared: Sequence[Basis], tensors: Mapping[str, Tensor]) -> Any:
    if "shared" in spec:
        index, side = spec["shared"]
        return getattr(shared[index], side)
    start = f"frame.{number}."
    own = {name.removeprefix(start): tensor for name, tensor in tensors.items() if name.startswith(start)}
    inner = {name: getattr(shared[index], side) for name, (index, side) in spec["inner"].items()}
    return KINDS[spec["kind"]](**own, **spec["numbers"], **inner)
