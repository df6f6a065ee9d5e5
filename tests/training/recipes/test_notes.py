"""What `dmd2 recipes` says."""

from __future__ import annotations

from dmd2.training.recipes import RECIPES
from dmd2.training.recipes.notes import NOTES


def test_every_recipe_has_a_note_that_says_something() -> None:
    assert sorted(NOTES) == sorted(RECIPES)
    for name, note in NOTES.items():
        assert note.method and note.family and note.data and note.takes, name
        assert not note.published or ("FID" in note.published and "(" in note.published), name  # with its source
