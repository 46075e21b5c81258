"""A llama-like Discovery with exact shapes and members, without a model behind it."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction

import numpy as np

from llm_pruner.surgery.removal import kept_shapes, removed_positions
from llm_pruner.types import Companion, Discovery, FloatArray, Group, IntArray, Member, Removal


def fake_llama(
    layers: int = 4,
    hidden: int = 48,
    ffn: int = 96,
    kv_heads: int = 4,
    repeat: int = 2,
    head_dim: int = 8,
    vocab: int = 64,
    tied: bool = True,
    frozen: dict[str, str] | None = None,
) -> Discovery:
    """Return what tracing a llama finds.

    Args:
        layers: number of decoder layers.
        hidden: hidden_size.
        ffn: intermediate_size.
        kv_heads: key-value heads; each serves ``repeat`` query heads.
        repeat: query heads of a key-value head; 1 gives no ``query_heads`` groups.
        head_dim: channels of a head; its rotary pairs are the units of ``head_dim``.
        vocab: vocabulary size.
        tied: input and output embedding are one parameter.
        frozen: group name -> reason.
    """
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocab, hidden)}
    groups: list[Group] = []
    channels = _rows(hidden, 1)
    residual = [Member("model.embed_tokens.weight", 1, channels, 0)]
    pairs: list[Member] = []
    query = kv_heads * repeat
    reasons = frozen or {}
    order = 1

    def member(tensor: str, dim: int, index: IntArray) -> Member:
        return Member(tensor, dim, index, order)

    def add(name: str, kind: object, layer: int | None, size: int, **rest: object) -> None:
        path = "" if layer is None and kind != "layers" else "model.layers"
        known = {"frozen": reasons.get(name), "path": path} | rest
        groups.append(Group(name, kind, layer, size, **known))  # type: ignore

    for layer in range(layers):
        at = f"model.layers.{layer}"
        q, k, v, o = (f"{at}.self_attn.{letter}_proj.weight" for letter in "qkvo")
        gate, up, down = (f"{at}.mlp.{name}_proj.weight" for name in ("gate", "up", "down"))
        norms = [f"{at}.input_layernorm.weight", f"{at}.post_attention_layernorm.weight"]
        shapes |= {q: (query * head_dim, hidden), o: (hidden, query * head_dim)}
        shapes |= {k: (kv_heads * head_dim, hidden), v: (kv_heads * head_dim, hidden)}
        shapes |= {gate: (ffn, hidden), up: (ffn, hidden), down: (hidden, ffn)}
        shapes |= dict.fromkeys(norms, (hidden,))
        order += 10
        residual += [member(name, 1, channels) for name in (q, k, v, gate, up)]
        residual += [member(name, 0, channels) for name in (o, down, *norms)]
        of_kv, of_block = _rows(kv_heads, head_dim), _rows(kv_heads, head_dim * repeat)
        add(
            f"layers.{layer}.heads",
            "heads",
            layer,
            kv_heads,
            members=(
                member(q, 0, of_block),
                member(k, 0, of_kv),
                member(v, 0, of_kv),
                member(o, 1, of_block),
            ),
        )
        if repeat > 1:
            of_query = _rows(query, head_dim)
            add(
                f"layers.{layer}.query_heads",
                "query_heads",
                layer,
                query,
                members=(member(q, 0, of_query), member(o, 1, of_query)),
                blocks=np.arange(query, dtype=np.int64) // repeat,
                owner=f"layers.{layer}.heads",
            )
        pair = np.array(
            [[unit, unit + head_dim // 2] for unit in range(head_dim // 2)], dtype=np.int64
        )
        for name, count in ((q, query), (k, kv_heads)):
            starts = np.arange(count, dtype=np.int64) * head_dim
            pairs.append(member(name, 0, (pair[:, :, None] + starts).reshape(head_dim // 2, -1)))
        value = np.arange(head_dim, dtype=np.int64)[:, None]
        add(
            f"layers.{layer}.value_dim",
            "value_dim",
            layer,
            head_dim,
            members=(
                member(v, 0, value + np.arange(kv_heads) * head_dim),
                member(o, 1, value + np.arange(query) * head_dim),
            ),
            companions=(Companion("head_dim", Fraction(1, 2)),),
        )
        wide = _rows(ffn, 1)
        add(
            f"layers.{layer}.ffn",
            "ffn",
            layer,
            ffn,
            members=(member(gate, 0, wide), member(up, 0, wide), member(down, 1, wide)),
        )
    shapes["model.norm.weight"] = (hidden,)
    residual.append(member("model.norm.weight", 0, channels))
    if not tied:
        shapes["lm_head.weight"] = (vocab, hidden)
        residual.append(member("lm_head.weight", 1, channels))
    add("hidden", "hidden", None, hidden, members=tuple(residual))
    add(
        "head_dim",
        "head_dim",
        None,
        head_dim // 2,
        members=tuple(pairs),
        companions=tuple(
            Companion(f"layers.{layer}.value_dim", Fraction(2)) for layer in range(layers)
        ),
    )
    modules = tuple(f"model.layers.{layer}" for layer in range(layers))
    add("layers", "layers", None, layers, members=(), modules=modules)
    aliases = {"lm_head.weight": "model.embed_tokens.weight"} if tied else {}
    return Discovery(tuple(groups), (), shapes, {}, aliases)


def fake_scores(discovery: Discovery, seed: int = 0) -> dict[str, FloatArray]:
    """Return importance in proportion to the parameters that a unit holds, times noise."""
    generator = np.random.default_rng(seed)
    return {
        group.name: generator.uniform(0.5, 1.5, group.size)
        * max(1, sum(m.index.shape[1] for m in group.members))
        for group in discovery.groups
    }


def fake_pruned(discovery: Discovery, removal: Removal) -> Discovery:
    """Return what tracing finds once the removal is done: all renumbered, layers renamed."""
    gone = set(removal.get("layers", units()).tolist())
    left = [layer for layer in range(discovery.group("layers").size) if layer not in gone]

    def rename(name: str, layer: int) -> str:
        return name.replace(f"layers.{layer}.", f"layers.{left.index(layer)}.")

    def tensor_name(name: str) -> str:
        parts = name.split(".")
        return rename(name, int(parts[2])) if parts[1] == "layers" else name

    deleted = removed_positions(discovery, removal)
    groups: list[Group] = []
    for group in discovery.groups:
        if group.layer in gone:
            continue
        name = group.name if group.layer is None else rename(group.name, group.layer)
        lost = removal.get(group.name, units())
        blocks = group.blocks
        if blocks is not None:
            dead = removal.get(group.name.replace("query_heads", "heads"), units())
            lost = np.union1d(lost, np.flatnonzero(np.isin(blocks, dead)))
        kept = np.setdiff1d(np.arange(group.size), lost)
        if blocks is not None:
            blocks = np.unique(blocks[kept], return_inverse=True)[1].astype(np.int64)
        members = []
        for m in group.members:
            if "." in m.tensor and m.tensor.startswith(tuple(f"model.layers.{i}." for i in gone)):
                continue
            away = deleted.get((m.tensor, m.dim), units())
            index = m.index[kept]
            stay = ~np.isin(index, away)
            index = np.stack([row[keep] for row, keep in zip(index, stay, strict=True)])
            index = index - np.searchsorted(away, index)
            members.append(replace(m, tensor=tensor_name(m.tensor), index=index))
        groups.append(
            replace(
                group,
                name=name,
                layer=None if group.layer is None else left.index(group.layer),
                size=len(kept),
                members=tuple(members),
                blocks=blocks,
                owner=None if group.owner is None else rename(group.owner, group.layer or 0),
                companions=tuple(
                    c
                    if c.group == "head_dim"
                    else replace(c, group=rename(c.group, int(c.group.split(".")[1])))
                    for c in group.companions
                    if c.group == "head_dim" or int(c.group.split(".")[1]) not in gone
                ),
                modules=tuple(f"model.layers.{i}" for i in range(len(left)))
                if group.modules
                else (),
            )
        )
    shapes = {tensor_name(n): shape for n, shape in kept_shapes(discovery, removal).items()}
    return Discovery(tuple(groups), (), shapes, {}, discovery.aliases)


def units(*values: int) -> IntArray:
    """Return unit indices."""
    return np.array(values, dtype=np.int64)


def _rows(count: int, width: int) -> IntArray:
    return np.arange(count * width, dtype=np.int64).reshape(count, width)
