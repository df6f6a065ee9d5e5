"""DMD2's students as its release has them, one file each, and as folders of weights: both ways."""

from __future__ import annotations

from pathlib import Path

from dmd2.models.stable_diffusion.configs import TIMESTEPS, TIMESTEPS_OF, read_schedule
from dmd2.models.stable_diffusion.folder import UNET_FILE, family_of, save_text_to_image
from dmd2.runtime.errors import InvalidInput, UserError, WeightsError
from dmd2.runtime.loading import build_network
from dmd2.runtime.tensors import read_tensors, write_tensors
from dmd2.weights.manifest import MANIFEST, Student, read_manifest, verify, write_manifest

LICENCE = "that of {name} (DMD2's is CC BY-NC-SA 4.0: no commercial use) and that of the model it belongs to"
UP = ("lora_B.weight", "lora_up.weight", "lora.up.weight")
"""ends of the names of a LoRA's second factors"""


def import_student(source: Path, base: Path, out: Path, steps: int) -> None:
    """Makes the folder `out` of a student's UNet in one file, and all else of `base`.

    Args:
        source: `.bin` or `.safetensors` with diffusers' names, such as `dmd2_sdxl_4step_unet_fp16.bin`.
        base: folder in diffusers' layout, of the model that the student was distilled from.
        steps: that the student was distilled for.

    Raises:
        UserError: something is missing, or the tensors are not those of `base`'s UNet.
    """
    from diffusers import UNet2DConditionModel

    if steps not in TIMESTEPS:
        raise InvalidInput("steps", f"expected {' or '.join(map(str, sorted(TIMESTEPS)))}", steps)
    if out.exists():
        raise InvalidInput("out", "exists already; expected a new folder", out)
    known = read_manifest(base) if (base / MANIFEST).is_file() else None
    if known is not None:
        verify(base, known)
    if known is None and not (base / "text_encoder").is_dir():
        expected = "expected SDXL or SD 1.5 in diffusers' layout"
        raise WeightsError(f"has neither {MANIFEST} nor text_encoder; {expected}", base)
    timesteps = TIMESTEPS_OF.get(known.family if known else family_of(base), TIMESTEPS)
    folders = ["unet", *([known.teacher.subfolder] if known and known.teacher else [])]
    config = next((base / name / "config.json" for name in folders if (base / name / "config.json").is_file()), None)
    if config is None:
        raise WeightsError("has no unet/config.json; expected a folder in diffusers' layout", base)
    unet = build_network(UNet2DConditionModel, config)
    tensors, expected = read_tensors(source), unet.state_dict()
    for name in sorted(tensors.keys() ^ expected.keys()):
        which = "lacks" if name in expected else "has beside them"
        raise UserError(
            f"{source}: {which} {name[:200]!r}; expected the tensors of {base}'s UNet, by diffusers' names"
        )
    for name, value in tensors.items():
        if value.shape != expected[name].shape:
            shapes = f"{name} is {tuple(value.shape)}, but {base}'s is {tuple(expected[name].shape)}"
            raise UserError(f"{source}: {shapes}")
    unet.load_state_dict(tensors, assign=True)
    licence = LICENCE.format(name=source.name)
    schedule = read_schedule(base / "scheduler")
    size = known.native_size if known else (unet.config.sample_size * 8,) * 2
    student = Student(subfolder="unet" if steps == 4 else f"unet_{steps}step", timesteps=timesteps[steps])
    save_text_to_image(
        out,
        base,
        unet_subfolder=student.subfolder,
        unet=unet,
        prediction_type=schedule.prediction_type,
        recipe={"name": "convert student", "file": source.name},
        student=(steps, student),
        native_size=size,
        card=f"# {out.name}\n\nThe {steps}-step student in {source.name}. Licence: {licence}.\n",
    )
    write_manifest(out, read_manifest(out).model_copy(update={"name": out.name, "licence": licence}))


def export_student(folder: Path, out: Path, steps: int | None) -> None:
    """See `dmd2.models.family.export_weights`."""
    manifest = read_manifest(folder)
    if not manifest.students:
        raise WeightsError("holds no student", folder)
    steps = max(manifest.students) if steps is None else steps
    student = manifest.students.get(steps)
    if student is None:
        raise InvalidInput("steps", f"expected one of {', '.join(map(str, sorted(manifest.students)))}", steps)
    file = student.lora or f"{student.subfolder}/{UNET_FILE}"
    verify(folder, manifest, {Path(file).parts[0]})
    tensors = read_tensors(folder / file)
    if student.lora:  # the release's is used at scale 1
        scale = student.lora_scale
        tensors = {name: value * scale if name.endswith(UP) else value for name, value in tensors.items()}
    write_tensors({n: v.half() if v.is_floating_point() else v for n, v in tensors.items()}, out)
