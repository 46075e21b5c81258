"""What is put in place of a module's forward pass for a time, and taken away again."""

from __future__ import annotations

from torch import nn

from llm_pruner.models.forward import own_forward


def test_own_forward_gives_back_just_what_was_there() -> None:
    plain, replaced = nn.Linear(2, 2), nn.Linear(2, 2)
    kept = {"forward": abs, "_original_forward": len}
    vars(replaced).update(kept)
    with own_forward(plain, replaced):
        for one in (plain, replaced):
            one.forward = one._original_forward = print  # as accelerate does
    assert not {*kept} & vars(plain).keys()
    assert {name: vars(replaced)[name] for name in kept} == kept
