"""Deletion events: unification, substitution, freezing."""

from __future__ import annotations

import copy

import numpy as np
import pytest

from llm_pruner.tracing.atoms import Atoms, empty_rows, product_rows


def lists(rows: np.ndarray) -> list[list[int]]:
    return [sorted(atom for atom in row if atom) for row in rows.tolist()]


def test_single_atoms_become_one_class() -> None:
    atoms = Atoms()
    a, b, c = (atoms.fresh(3) for _ in range(3))
    atoms.unify(a, b)
    atoms.unify(b, c)
    assert (atoms.resolve(a) == atoms.resolve(c)).all()
    assert len(np.unique(atoms.resolve(np.concatenate([a, b, c])))) == 3


def test_reversed_axis_ties_mirrored_positions() -> None:
    atoms = Atoms()
    a = atoms.fresh(4)
    atoms.unify(a, a[::-1])
    resolved = atoms.resolve(a)[:, 0]
    assert resolved[0] == resolved[3] != resolved[1] == resolved[2]


def test_one_atom_is_substituted_by_a_product() -> None:
    atoms = Atoms()
    flat, heads, channels = atoms.fresh(6), atoms.fresh(2), atoms.fresh(3)
    atoms.unify(flat, product_rows(heads, channels))
    assert lists(atoms.resolve(flat)) == [
        [heads[i, 0], channels[j, 0]] for i in range(2) for j in range(3)
    ]
    # What was known of the axis before holds for the product.
    other = atoms.fresh(6)
    atoms.unify(other, flat)
    assert lists(atoms.resolve(other)) == lists(atoms.resolve(flat))


def test_products_of_equal_form_are_paired_by_their_partition() -> None:
    atoms = Atoms()
    a, b = (atoms.fresh(2), atoms.fresh(3)), (atoms.fresh(2), atoms.fresh(3))
    left = product_rows(*a)
    right = product_rows(*b)[:, ::-1]
    atoms.unify(left, right)
    assert (atoms.find(a[0]) == atoms.find(b[0])).all()
    assert (atoms.find(a[1]) == atoms.find(b[1])).all()


def test_products_that_divide_differently_are_frozen() -> None:
    atoms = Atoms()
    a, b, c, d, e = (atoms.fresh(1) for _ in range(5))
    atoms.unify(np.hstack([a, b, np.zeros((1, 1), int)]), np.hstack([c, d, e]))
    assert atoms.resolve(np.concatenate([a, b, c, d, e])).size == 0
    assert atoms.reason(a) == "two views of one axis divide it differently"


def test_an_atom_that_would_contain_itself_is_frozen_or_free() -> None:
    atoms = Atoms()
    a, b = atoms.fresh(2), atoms.fresh(2)
    # a0 = {a1, b0} and a1 = {a0, b1}: only "never deleted" satisfies both.
    atoms.unify(a, np.hstack([a[::-1], b]))
    assert atoms.resolve(a).size == 0
    assert "contradict" in str(atoms.reason(a))


def test_freezing_spreads_with_its_reason() -> None:
    atoms = Atoms()
    a, b, c = atoms.fresh(3), atoms.fresh(3), atoms.fresh(3)
    atoms.freeze(a, "because")
    atoms.unify(a, b)
    atoms.unify(b[:1], c[:1])
    assert atoms.resolve(b).size == 0
    assert atoms.reason(b) == "because"
    assert (atoms.resolve(c)[:, 0] > 0).tolist() == [False, True, True]
    assert atoms.reason(c) == "because"
    assert atoms.reason(c[1:]) is None


def test_freezing_a_substituted_axis_freezes_what_replaced_it() -> None:
    atoms = Atoms()
    flat, heads, channels = atoms.fresh(6), atoms.fresh(2), atoms.fresh(3)
    atoms.unify(flat, product_rows(heads, channels))
    atoms.freeze(flat[:1], "first")
    assert (atoms.resolve(heads) > 0).any(axis=1).tolist() == [False, True]
    assert (atoms.resolve(channels) > 0).any(axis=1).tolist() == [False, True, True]


def test_axis_without_atoms_freezes_its_partner() -> None:
    atoms = Atoms()
    a = atoms.fresh(3)
    atoms.unify(a, empty_rows(3))
    assert atoms.resolve(a).size == 0
    assert "cannot shrink" in str(atoms.reason(a))


def test_reason_names_the_cause_rather_than_what_both_share() -> None:
    atoms = Atoms()
    batch, fixed, live = atoms.fresh(1), atoms.fresh(2), atoms.fresh(2)
    atoms.freeze(batch, "the batch")
    atoms.freeze(fixed, "the cause")
    atoms.unify(
        np.hstack([np.repeat(batch, 2, 0), live]), np.hstack([np.repeat(batch, 2, 0), fixed])
    )
    assert atoms.reason(live) == "the cause"


def test_axes_of_different_sizes_cannot_be_unified() -> None:
    atoms = Atoms()
    with pytest.raises(ValueError, match="axes of 2 and 3 positions"):
        atoms.unify(atoms.fresh(2), atoms.fresh(3))


def test_replica_axis_stops_being_one_when_tied() -> None:
    atoms = Atoms()
    copies, other = atoms.fresh(3, replica=True), atoms.fresh(3)
    assert atoms.is_replica(copies)
    assert not atoms.is_replica(other)
    atoms.unify(copies, other)
    assert not atoms.is_replica(copies)


def test_copy_is_independent() -> None:
    atoms = Atoms()
    a, b = atoms.fresh(2), atoms.fresh(2)
    other = copy.deepcopy(atoms)
    other.unify(a, b)
    other.freeze(a, "only there")
    assert (atoms.find(a) != atoms.find(b)).all()
    assert atoms.reason(a) is None


def test_room_grows_without_loss() -> None:
    atoms = Atoms()
    first = atoms.fresh(1000)
    atoms.freeze(first[:1], "early")
    second = atoms.fresh(5000)
    atoms.unify(second[:1000], first)
    assert atoms.resolve(first[1:]).all()
    assert atoms.reason(second[:1]) == "early"
