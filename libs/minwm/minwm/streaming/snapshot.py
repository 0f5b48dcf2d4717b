"""A session as data: to be kept in memory, written to a folder, and gone on with elsewhere, bit for bit.

On disk: `session.safetensors`, the tensors, and `session.json`: format version, the model's fingerprint, the file's
SHA-256 and what is not a tensor. A damaged or foreign snapshot is refused with the reason.
"""

import hashlib
import json
import os
import shutil
from collections import deque
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor

from minwm.config import build
from minwm.errors import ConfigError, InputError, SessionError
from minwm.models.prope import Cameras
from minwm.streaming.engine import StreamingEngine
from minwm.streaming.session import Clean, Session

VERSION = 1
HEADER, TENSORS = "session.json", "session.safetensors"
_SAMPLE = 4096  # values of each tensor that a fingerprint looks at


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a snapshot is of. `fingerprint`: of the model, whose weights and configuration it goes on with."""

    version: int
    model: str
    fingerprint: str
    caption: str
    seed: int
    chunks: int
    frames: int
    anchored: int


@dataclass(frozen=True)
class Snapshot:
    """A session between two chunks; its tensors are on the CPU and its own."""

    header: Header
    tensors: dict[str, Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


def fingerprint(engine: StreamingEngine) -> str:
    """Of an engine's model: its name, configuration, and a sample of every weight."""
    world = engine.world
    digest = hashlib.sha256(repr((asdict(world.card), world.backbone.config)).encode())
    for part in (world.backbone.model, world.autoencoder):
        for name, tensor in sorted(part.state_dict().items()):
            flat = tensor.detach().flatten()
            sample = flat[:: max(1, len(flat) // _SAMPLE)].float().cpu().numpy()
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode() + sample.tobytes())
    return digest.hexdigest()


def take(engine: StreamingEngine, session: Session) -> Snapshot:
    """The session as it now is; it may go on. Raises SessionError for a closed one."""
    if session.closed:
        raise SessionError("the session is closed")
    header = Header(
        version=VERSION,
        model=engine.spec.model,
        fingerprint=fingerprint(engine),
        caption=session.caption,
        seed=session.seed,
        chunks=session.chunks,
        frames=session.rollout.frames,
        anchored=session.anchored,
    )
    tensors = {f"cache.{name}": tensor for name, tensor in session.rollout.cache.state().items()}
    tensors |= {"local": torch.from_numpy(session.local), "origin": torch.from_numpy(session.origin)}
    if session.rollout.sinks is not None:
        tensors |= {f"sinks.{name}": getattr(session.rollout.sinks, name) for name in _CAMERAS}
    for number, part in enumerate(session.decoder_state or ()):
        tensors[f"decoder.{number:03}"] = part
    pending = [] if session.pending is None else [session.pending]
    for kind, chunks in {"pending": pending, "begun": session.begun, "kept": list(session.kept)}.items():
        for number, chunk in enumerate(chunks):
            tensors |= {f"{kind}.{number:03}.{name}": value for name, value in _to_tensors(chunk).items()}
    return Snapshot(header, {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()})


def restore(engine: StreamingEngine, snapshot: Snapshot, *, seed: int | None = None) -> Session:
    """The session in a slot of this engine; with another `seed`, a fork whose further noise is its own.

    Raises SessionError for a snapshot of another version or model, or when no slot is free.
    """
    header, own = snapshot.header, fingerprint(engine)
    if header.version != VERSION:
        raise SessionError(f"snapshot: is of version {header.version}, expected {VERSION}")
    if header.fingerprint != own:
        raise SessionError(
            f"snapshot: is of model {header.model} ({header.fingerprint[:12]}), "
            f"expected {engine.spec.model} ({own[:12]})"
        )
    session = engine.new_session(header.caption, header.seed if seed is None else seed)
    try:
        _fill(session, header, snapshot.tensors, engine.device)
    except (InputError, KeyError) as error:
        engine.close(session)
        raise SessionError(f"snapshot: does not fit the model ({error})") from error
    return session


def write(snapshot: Snapshot, folder: Path) -> None:
    """Write a snapshot to a new folder, aside and renamed. Raises SessionError where the folder exists."""
    if folder.exists():
        raise SessionError(f"snapshot: {folder} exists, expected a new folder")
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    content = save(snapshot.tensors)
    (partial / TENSORS).write_bytes(content)
    header = {**asdict(snapshot.header), "sha256": hashlib.sha256(content).hexdigest()}
    (partial / HEADER).write_text(json.dumps(header, indent=1) + "\n")
    os.replace(partial, folder)


def read(folder: Path) -> Snapshot:
    """Read a snapshot. Raises SessionError for one that is missing, damaged or of another version."""
    try:
        header = json.loads((folder / HEADER).read_text())
        content = (folder / TENSORS).read_bytes()
        expected = header.pop("sha256")
        if header.get("version") != VERSION:
            raise SessionError(f"snapshot {folder}: is of version {header.get('version')}, expected {VERSION}")
        known = build(Header, header, HEADER)
    except (OSError, ValueError, KeyError, AttributeError, ConfigError) as error:
        raise SessionError(f"snapshot {folder}: cannot be read ({error})") from error
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise SessionError(f"snapshot {folder}: is damaged, its checksum is {found[:12]}, expected {expected[:12]}")
    return Snapshot(known, load(content))


_CAMERAS = ("viewmats", "intrinsics", "motions")


def _fill(session: Session, header: Header, tensors: Mapping[str, Tensor], device: torch.device) -> None:
    def group(prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}

    rollout = session.rollout
    rollout.cache.load_state(group("cache."))
    rollout.frames = header.frames
    sinks = group("sinks.")
    rollout.sinks = Cameras(*(sinks[name].to(device) for name in _CAMERAS)) if sinks else None
    session.local, session.origin = tensors["local"].numpy().copy(), tensors["origin"].numpy().copy()
    session.anchored, session.chunks = header.anchored, header.chunks
    session.decoder_state = tuple(part.to(device) for _, part in sorted(group("decoder.").items())) or None
    chunks = {kind: _to_chunks(group(f"{kind}."), device) for kind in ("pending", "begun", "kept")}
    session.pending = chunks["pending"][0] if chunks["pending"] else None
    session.begun, session.kept = chunks["begun"], deque(chunks["kept"])


def _to_tensors(chunk: Clean) -> dict[str, Tensor]:
    tensors = {"latents": chunk.latents, "start": torch.tensor(chunk.start), "poses": torch.from_numpy(chunk.poses)}
    if chunk.image is not None:
        tensors["image"] = chunk.image
    if chunk.window is not None:
        tensors["window"] = torch.tensor(chunk.window)
    return tensors


def _to_chunks(tensors: Mapping[str, Tensor], device: torch.device) -> list[Clean]:
    found: dict[str, dict[str, Any]] = {}
    for name, tensor in tensors.items():
        number, _, part = name.partition(".")
        found.setdefault(number, {})[part] = tensor
    return [
        Clean(
            parts["latents"].to(device),
            int(parts["start"]),
            parts["poses"].numpy().copy(),
            parts["image"].to(device) if "image" in parts else None,
            int(parts["window"]) if "window" in parts else None,
        )
        for _, parts in sorted(found.items())
    ]
