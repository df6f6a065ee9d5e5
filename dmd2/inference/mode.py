"""Which network makes an image, and through which levels: the modes of a folder of weights, parsed once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dmd2.runtime.errors import InvalidInput, UserError
from dmd2.weights.manifest import Manifest, Student

if TYPE_CHECKING:  # torch takes a second: a mode that does not exist is told before
    from dmd2.diffusion.denoiser import Denoiser


@dataclass(frozen=True)
class Mode:
    """ "4" is the four-step student, "teacher" the teacher with its own sampler and guidance, and "teacher-4" the
    undistilled teacher, guided, put through the levels of the four-step student: what distillation must beat."""

    name: str
    subfolder: str
    """of the network"""
    steps: int
    student: Student | None = None
    """whose network it is, with its LoRA; None for the teacher's"""
    levels: Student | None = None
    """whose levels the few-step sampler goes through; None for the teacher's own sampler"""
    guidance_scale: float | None = None
    """None: not guided"""

    @classmethod
    def parse(cls, name: str, manifest: Manifest) -> Mode:
        """Raises UserError unless the weights have such a mode, naming those that they have."""
        for mode in cls.all(manifest):
            if mode.name == name:
                return mode
        valid = ", ".join(modes_of(manifest)) or "no student"
        raise InvalidInput("steps", f"these weights have {valid}", name)

    @classmethod
    def all(cls, manifest: Manifest) -> list[Mode]:
        """The students by their steps, the teacher, the teacher in a student's steps."""
        students, teacher = sorted(manifest.students.items()), manifest.teacher
        modes = [cls(str(steps), student.subfolder, steps, student, student) for steps, student in students]
        if teacher is not None:
            modes.append(cls.of_teacher(manifest, teacher.steps))
            modes += [
                cls(f"teacher-{steps}", teacher.subfolder, steps, None, student, teacher.guidance_scale)
                for steps, student in reversed(students)
            ]
        return modes

    @classmethod
    def of_teacher(cls, manifest: Manifest, steps: int) -> Mode:
        """The teacher's own sampler with any number of steps."""
        assert manifest.teacher is not None
        return cls("teacher", manifest.teacher.subfolder, steps, guidance_scale=manifest.teacher.guidance_scale)

    def timesteps(self, strength: float = 1.0) -> list[int]:
        """The few-step student's, descending, that are left of them at this strength; empty if it has only sigmas."""
        from dmd2.diffusion.sampling import timesteps_for_strength

        return [] if self.levels is None else timesteps_for_strength(self.levels.timesteps, strength)

    def sigmas(self, denoiser: Denoiser, strength: float = 1.0) -> list[float]:
        """The noise levels of the steps, descending."""
        from dmd2.diffusion.sampling import teacher_sigmas

        if self.levels is None:
            return teacher_sigmas(denoiser, self.steps)
        return self.levels.sigmas or denoiser.table[self.timesteps(strength)].float().tolist()


def modes_of(manifest: Manifest) -> list[str]:
    """What `Engine` can generate with."""
    return [mode.name for mode in Mode.all(manifest)]


def default_mode(manifest: Manifest) -> str:
    """The student with the most steps, else the teacher. Raises UserError if there is neither."""
    modes = modes_of(manifest)
    if not modes:
        raise UserError(f"weights {manifest.name}: have neither a student nor a teacher to generate with")
    return modes[max(0, len(manifest.students) - 1)]
