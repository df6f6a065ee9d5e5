"""Modes are parsed once: every name that weights offer comes back as itself, every other one is refused."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dmd2.inference.mode import Mode, default_mode, modes_of
from dmd2.runtime.errors import UserError
from dmd2.weights.manifest import Manifest, Student, Teacher

NAMES = st.one_of(st.text(max_size=12), st.from_regex(r"(teacher-?)?[0-9]{0,3}", fullmatch=True))


def manifest(steps: list[int], teacher: bool) -> Manifest:
    students = {n: Student(subfolder=f"unet_{n}", timesteps=sorted(range(n), reverse=True)) for n in steps}
    own = Teacher(steps=25, guidance_scale=3.0) if teacher else None
    return Manifest(name="tiny", native_size=(8, 8), licence="none", students=students, teacher=own)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(1, 12), unique=True, max_size=3), st.booleans(), NAMES)
def test_a_name_is_a_mode_of_the_weights_or_an_error_that_lists_them(
    steps: list[int], teacher: bool, name: str
) -> None:
    weights = manifest(steps, teacher)
    names = modes_of(weights)
    assert set(names) == {*map(str, steps), *(["teacher", *(f"teacher-{n}" for n in steps)] if teacher else [])}
    for each in names:
        mode = Mode.parse(each, weights)
        assert mode.name == each and mode.subfolder == ("unet_teacher" if "teacher" in each else f"unet_{each}")
        assert (mode.student is None) == (mode.guidance_scale is not None) == ("teacher" in each)
        assert mode.steps == (25 if each == "teacher" else int(each.removeprefix("teacher-")))
        assert len(mode.timesteps()) == (0 if each == "teacher" else mode.steps)
    if name not in names:
        with pytest.raises(UserError, match=re.escape(", ".join(names) or "no student")):
            Mode.parse(name, weights)


def test_the_default_is_the_student_with_the_most_steps_else_the_teacher() -> None:
    assert default_mode(manifest([4, 1], teacher=True)) == "4"
    assert default_mode(manifest([], teacher=True)) == "teacher"
    with pytest.raises(UserError, match="neither a student nor a teacher"):
        default_mode(manifest([], teacher=False))


def test_levels_are_those_of_the_student_and_a_strength_leaves_the_last() -> None:
    class Table:
        sigmas = torch.arange(1, 11) / 4
        table = sigmas.double()

    weights = manifest([4], teacher=True)
    assert Mode.parse("4", weights).sigmas(Table()) == [1.0, 0.75, 0.5, 0.25]  # type: ignore[arg-type]
    assert Mode.parse("teacher-4", weights).sigmas(Table(), 0.5) == [0.5, 0.25]  # type: ignore[arg-type]
    teacher = Mode.of_teacher(weights, 7).sigmas(Table())  # type: ignore[arg-type]
    assert len(teacher) == 7 and teacher[0] == pytest.approx(2.5) and teacher == sorted(teacher, reverse=True)
