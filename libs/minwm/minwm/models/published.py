"""Published checkpoints by their tensors' names: which format it is, and how its tensors become ours, or ours theirs.

Our modules are named as the official checkpoints are; Diffusers names them otherwise, splits one and swaps the halves
of another. A plan says of every wanted tensor which rows of which tensors it is made of, so shapes are known before a
value is read, and values are read one tensor at a time.
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from minwm.errors import CheckpointError
from minwm.models.hunyuan import HunyuanConfig
from minwm.models.sources import Tensors
from minwm.models.wan import WanConfig


@dataclass(frozen=True)
class Rows:
    """The part-th of `parts` equal runs of a tensor's rows."""

    name: str
    part: int = 0
    parts: int = 1


Plan = dict[str, tuple[Rows, ...]]
"""What every wanted tensor is made of, one after the other."""


class Planned:
    """The tensors that a plan makes of others. Raises CheckpointError where the shapes do not go together."""

    def __init__(self, source: Tensors, plan: Plan) -> None:
        self._source, self._plan = source, plan
        self.shapes: Mapping[str, Tensor] = {name: self._made(rows, source.shapes) for name, rows in plan.items()}

    def read(self, name: str) -> Tensor:
        """See sources.Tensors."""
        rows = self._plan[name]
        return self._made(rows, {row.name: self._source.read(row.name) for row in rows})

    @staticmethod
    def _made(rows: tuple[Rows, ...], tensors: Mapping[str, Tensor]) -> Tensor:
        if rows == (Rows(rows[0].name),):
            return tensors[rows[0].name]
        try:
            return torch.cat([tensors[row.name].tensor_split(row.parts)[row.part] for row in rows])
        except RuntimeError as error:
            shapes = ", ".join(f"{row.name} {tuple(tensors[row.name].shape)}" for row in rows)
            raise CheckpointError(f"{shapes}: tensors of one layer whose shapes do not go together") from error


class Names:
    """Two sets of names for the same layers.

    same: names on either side; `#` stands for a block's number. Names are layers', or parameters'
    stacked: one of ours whose rows are several of theirs
    swapped: ours and theirs, whose halves are the other way round
    """

    def __init__(
        self,
        same: Mapping[str, str],
        stacked: Mapping[str, tuple[str, ...]] | None = None,
        swapped: Mapping[str, str] | None = None,
    ) -> None:
        self._ours: Plan = {}
        self._theirs: Plan = {}
        for ours, theirs in same.items():
            self._ours[ours], self._theirs[theirs] = (Rows(theirs),), (Rows(ours),)
        for ours, parts in (stacked or {}).items():
            self._ours[ours] = tuple(Rows(part) for part in parts)
            self._theirs |= {part: (Rows(ours, i, len(parts)),) for i, part in enumerate(parts)}
        for ours, theirs in (swapped or {}).items():
            self._ours[ours] = Rows(theirs, 1, 2), Rows(theirs, 0, 2)
            self._theirs[theirs] = Rows(ours, 1, 2), Rows(ours, 0, 2)

    def to_ours(self, names: Collection[str]) -> tuple[Plan, list[str]]:
        """Our tensors out of theirs, and those of theirs that have no counterpart or lack what goes with them."""
        return _fill(self._ours, names)

    def to_theirs(self, names: Collection[str]) -> tuple[Plan, list[str]]:
        """Their tensors out of ours, and those of ours that have no counterpart."""
        return _fill(self._theirs, names)


_BLOCK = re.compile(r"(?<=blocks\.)\d+")


def _fill(templates: Plan, names: Collection[str]) -> tuple[Plan, list[str]]:
    """The tensors that templates make of the named ones, and the names that no template uses."""
    targets: dict[str, list[str]] = {}
    for target, rows in templates.items():
        for row in rows:
            targets.setdefault(row.name, []).append(target)
    present, used, plan = set(names), set(), Plan()
    for name in names:
        for template, number, parameter in _readings(name):
            for target in targets.get(template, ()):
                rows = tuple(replace(row, name=_named(row.name, number, parameter)) for row in templates[target])
                if all(row.name in present for row in rows):
                    plan[_named(target, number, parameter)] = rows
                    used |= {row.name for row in rows}
    return plan, [name for name in names if name not in used]


def _readings(name: str) -> Iterator[tuple[str, str, str]]:
    """A name as a template, its block's number and a parameter: of a parameter's name, then of a layer's."""
    number = "".join(_BLOCK.findall(name)[:1])
    template = _BLOCK.sub("#", name)
    yield template, number, ""
    layer, dot, parameter = template.rpartition(".")
    if dot:
        yield layer, number, parameter


def _named(template: str, number: str, parameter: str) -> str:
    layer = template.replace("#", number)
    return f"{layer}.{parameter}" if parameter else layer


OFFICIAL = Names({f"conditions.action_timestep.mlp.{layer}": f"action_in.mlp.{layer}" for layer in (0, 2)})

_ATTENTION = {"q": "to_q", "k": "to_k", "v": "to_v", "o": "to_out.0", "norm_q": "norm_q", "norm_k": "norm_k"}
WAN_DIFFUSERS = Names(
    {
        "patch_embedding": "patch_embedding",
        "text_embedding.0": "condition_embedder.text_embedder.linear_1",
        "text_embedding.2": "condition_embedder.text_embedder.linear_2",
        "time_embedding.0": "condition_embedder.time_embedder.linear_1",
        "time_embedding.2": "condition_embedder.time_embedder.linear_2",
        "time_projection.1": "condition_embedder.time_proj",
        "blocks.#.modulation": "blocks.#.scale_shift_table",
        "blocks.#.norm3": "blocks.#.norm2",  # Diffusers counts in the order of use
        "blocks.#.ffn.0": "blocks.#.ffn.net.0.proj",
        "blocks.#.ffn.2": "blocks.#.ffn.net.2",
        "head.modulation": "scale_shift_table",
        "head.head": "proj_out",
    }
    | {
        f"blocks.#.{ours}.{part}": f"blocks.#.{theirs}.{their_part}"
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
        for part, their_part in _ATTENTION.items()
    }
)

_REFINER, _THEIR_REFINER = "txt_in.individual_token_refiner.blocks.#", "context_embedder.token_refiner.refiner_blocks.#"
_BLOCKS, _THEIR_BLOCKS = "double_blocks.#", "transformer_blocks.#"
HUNYUAN_DIFFUSERS = Names(
    {
        "img_in.proj": "x_embedder.proj",
        "txt_in.input_embedder": "context_embedder.proj_in",
        "txt_in.t_embedder.mlp.0": "context_embedder.time_text_embed.timestep_embedder.linear_1",
        "txt_in.t_embedder.mlp.2": "context_embedder.time_text_embed.timestep_embedder.linear_2",
        "txt_in.c_embedder.linear_1": "context_embedder.time_text_embed.text_embedder.linear_1",
        "txt_in.c_embedder.linear_2": "context_embedder.time_text_embed.text_embedder.linear_2",
        f"{_REFINER}.norm1": f"{_THEIR_REFINER}.norm1",
        f"{_REFINER}.norm2": f"{_THEIR_REFINER}.norm2",
        f"{_REFINER}.self_attn_proj": f"{_THEIR_REFINER}.attn.to_out.0",
        f"{_REFINER}.mlp.fc1": f"{_THEIR_REFINER}.ff.net.0.proj",
        f"{_REFINER}.mlp.fc2": f"{_THEIR_REFINER}.ff.net.2",
        f"{_REFINER}.adaLN_modulation.1": f"{_THEIR_REFINER}.norm_out.linear",
        "byt5_in.layernorm": "context_embedder_2.norm",
        "byt5_in.fc1": "context_embedder_2.linear_1",
        "byt5_in.fc2": "context_embedder_2.linear_2",
        "byt5_in.fc3": "context_embedder_2.linear_3",
        "vision_in.proj.0": "image_embedder.norm_in",
        "vision_in.proj.1": "image_embedder.linear_1",
        "vision_in.proj.3": "image_embedder.linear_2",
        "vision_in.proj.4": "image_embedder.norm_out",
        "time_in.mlp.0": "time_embed.timestep_embedder.linear_1",
        "time_in.mlp.2": "time_embed.timestep_embedder.linear_2",
        "cond_type_embedding": "cond_type_embed",
        "final_layer.linear": "proj_out",
        f"{_BLOCKS}.img_mod.linear": f"{_THEIR_BLOCKS}.norm1.linear",
        f"{_BLOCKS}.txt_mod.linear": f"{_THEIR_BLOCKS}.norm1_context.linear",
        f"{_BLOCKS}.img_attn_proj": f"{_THEIR_BLOCKS}.attn.to_out.0",
        f"{_BLOCKS}.txt_attn_proj": f"{_THEIR_BLOCKS}.attn.to_add_out",
        f"{_BLOCKS}.img_mlp.fc1": f"{_THEIR_BLOCKS}.ff.net.0.proj",
        f"{_BLOCKS}.img_mlp.fc2": f"{_THEIR_BLOCKS}.ff.net.2",
        f"{_BLOCKS}.txt_mlp.fc1": f"{_THEIR_BLOCKS}.ff_context.net.0.proj",
        f"{_BLOCKS}.txt_mlp.fc2": f"{_THEIR_BLOCKS}.ff_context.net.2",
    }
    | {f"{_BLOCKS}.img_attn_{part}": f"{_THEIR_BLOCKS}.attn.to_{part}" for part in "qkv"}
    | {f"{_BLOCKS}.txt_attn_{part}": f"{_THEIR_BLOCKS}.attn.add_{part}_proj" for part in "qkv"}
    | {f"{_BLOCKS}.img_attn_{part}_norm": f"{_THEIR_BLOCKS}.attn.norm_{part}" for part in "qk"}
    | {f"{_BLOCKS}.txt_attn_{part}_norm": f"{_THEIR_BLOCKS}.attn.norm_added_{part}" for part in "qk"},
    stacked={f"{_REFINER}.self_attn_qkv": tuple(f"{_THEIR_REFINER}.attn.to_{part}" for part in "qkv")},
    swapped={"final_layer.adaLN_modulation.1": "norm_out.linear"},  # shift and scale
)


@dataclass(frozen=True)
class Format:
    """How one publisher names a backbone's tensors; `marks` are names that tell it from those after it."""

    title: str
    kind: Literal["wan", "hunyuan"]
    names: Names
    marks: tuple[str, ...]


_BY_CAMERA = "double_blocks.0.img_attn_prope_proj.weight"
FORMATS = (  # the most specific first
    Format("HY-WorldPlay", "hunyuan", OFFICIAL, (_BY_CAMERA, "action_in.mlp.0.weight")),
    Format("minWM HunyuanVideo-1.5", "hunyuan", OFFICIAL, (_BY_CAMERA,)),
    Format("HunyuanVideo-1.5", "hunyuan", OFFICIAL, ("double_blocks.0.img_attn_q.weight",)),
    Format(
        "HunyuanVideo-1.5 (Diffusers)",
        "hunyuan",
        HUNYUAN_DIFFUSERS,
        ("transformer_blocks.0.attn.add_q_proj.weight", "cond_type_embed.weight"),
    ),
    Format("minWM Wan 2.1", "wan", OFFICIAL, ("blocks.0.self_attn.prope_o.weight",)),
    Format("Wan 2.1", "wan", OFFICIAL, ("blocks.0.self_attn.q.weight",)),
    Format("Wan 2.1 (Diffusers)", "wan", WAN_DIFFUSERS, ("blocks.0.attn1.to_q.weight",)),
)

_INFIXES = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_WRAPPER = "model."


def recognise(names: Collection[str], where: str) -> Format:
    """The format that a checkpoint's names, stripped, belong to. Raises CheckpointError when there is none."""
    for candidate in FORMATS:
        if all(mark in names for mark in candidate.marks):
            return candidate
    some = ", ".join(sorted(names)[:4])
    known = ", ".join(known.title for known in FORMATS)
    raise CheckpointError(f"{where}: looks like none of the known formats (it holds {some}, …), expected {known}")


def stripped(names: Iterable[str], where: str) -> Plan:
    """Names without what FSDP, activation checkpointing, compilation and a wrapper around the model added to them."""
    bare = {name: _INFIXES.sub("", name) for name in names}
    if all(name.startswith(_WRAPPER) for name in bare.values()):
        bare = {name: short.removeprefix(_WRAPPER) for name, short in bare.items()}
    return _extended(Plan(), bare, where)


def _extended(plan: Plan, renamed: Mapping[str, str], where: str) -> Plan:
    """The plan with tensors added under their new names. Raises CheckpointError when two would get the same."""
    for name, new in renamed.items():
        if new in plan:
            raise CheckpointError(f"{where}: {plan[new][0].name} and {name} are both {new}")
        plan[new] = (Rows(name),)
    return plan


def read_published(source: Tensors, where: str) -> tuple[Format, Planned]:
    """The format of a checkpoint and its tensors under our names; what is unknown keeps its own."""
    bare = Planned(source, stripped(source.shapes, where))
    found = recognise(bare.shapes.keys(), where)
    plan, unknown = found.names.to_ours(bare.shapes.keys())
    return found, Planned(bare, _extended(plan, {name: name for name in unknown}, where))


def absent_branches(expected: Collection[str], found: Collection[str]) -> list[str]:
    """Expected tensors of condition branches that a checkpoint has nothing of, as a base model has not."""
    present = {_branch(name) for name in found}
    return [name for name in expected if (branch := _branch(name)) is not None and branch not in present]


def _branch(name: str) -> str | None:
    """The condition that a tensor of ours belongs to."""
    if name.startswith("conditions."):
        return name.split(".")[1]
    return "camera_prope" if ".prope_o." in name or ".img_attn_prope_proj." in name else None


def as_diffusers(source: Tensors, architecture: WanConfig | HunyuanConfig, where: str) -> Planned:
    """Our tensors under Diffusers' names. Raises CheckpointError listing those that its class has no place for."""
    names = WAN_DIFFUSERS if isinstance(architecture, WanConfig) else HUNYUAN_DIFFUSERS
    plan, homeless = names.to_theirs(source.shapes.keys())
    if homeless:
        listed = ", ".join(homeless)
        raise CheckpointError(f"{where}: Diffusers' class has no place for {listed}; only base models can be written")
    return Planned(source, plan)


def diffusers_config(architecture: WanConfig | HunyuanConfig) -> dict[str, Any]:
    """`config.json` of Diffusers' class."""
    shared = {"num_attention_heads": architecture.heads, "attention_head_dim": architecture.head_dim}
    shared |= {"num_layers": architecture.layers, "out_channels": architecture.channels}
    if isinstance(architecture, WanConfig):
        return {
            "_class_name": "WanTransformer3DModel",
            **shared,
            "added_kv_proj_dim": None,
            "cross_attn_norm": True,
            "eps": architecture.eps,
            "ffn_dim": architecture.ffn_dim,
            "freq_dim": architecture.frequencies,
            "image_dim": None,
            "in_channels": architecture.channels,
            "patch_size": [1, *architecture.patch],
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 1024,
            "text_dim": architecture.text_dim,
        }
    return {
        "_class_name": "HunyuanVideo15Transformer3DModel",
        **shared,
        "image_embed_dim": architecture.vision_dim,
        "in_channels": 2 * architecture.channels + 1,
        "mlp_ratio": architecture.mlp_dim / architecture.dim,
        "num_refiner_layers": architecture.refiner_layers,
        "patch_size": 1,
        "patch_size_t": 1,
        "qk_norm": "rms_norm",
        "rope_axes_dim": list(architecture.axes),
        "rope_theta": architecture.theta,
        "target_size": 640,
        "task_type": "i2v",
        "text_embed_2_dim": architecture.glyph_dim,
        "text_embed_dim": architecture.text_dim,
        "use_meanflow": False,
    }
