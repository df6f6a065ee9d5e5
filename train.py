"""Cog's `/trainings`: prompts in, a LoRA student out. What happens in between is `dmd2.service.cog.trainings`.

Cog reads this file without running it: inputs have literal defaults and bounds, and plain types.
"""

from typing import Optional

from cog import BaseModel, Input, Path

from dmd2.runtime.errors import told_briefly
from dmd2.service.cog.trainings import train_student


class TrainingOutput(BaseModel):
    weights: Path


def train(
    prompts: str = Input(description="What the student is trained on, one prompt a line.", default=""),
    prompts_file: Optional[str] = Input(
        description="Instead, a file by https or data URL: text, JSON lines, Parquet, or a pickled list.",
        regex=r"^(https://|data:)",
        default=None,
    ),
    images: Optional[str] = Input(
        description="Zip of images with captions (a.jpg, a.txt), by https or data URL: with it, a GAN helps.",
        regex=r"^(https://|data:)",
        default=None,
    ),
    num_inference_steps: int = Input(description="Of the student.", choices=[1, 4], default=4),
    iterations: int = Input(
        description="Updates of the fake score; the student has a fifth.", ge=1, le=100000, default=1000
    ),
    batch_size: int = Input(description="Images in an update.", ge=1, le=256, default=4),
    learning_rate: float = Input(description="Of both.", ge=1e-08, le=0.01, default=5e-05),
    rank: int = Input(description="Of the LoRA.", ge=1, le=256, default=64),
    seed: int = Input(description="Of everything random.", ge=0, le=2147483647, default=0),
    minutes: int = Input(description="That it may take.", ge=1, le=10080, default=120),
) -> TrainingOutput:
    """Distils the served weights' teacher into a LoRA for few steps."""
    with told_briefly():
        weights = train_student(
            {
                "prompts": prompts,
                "prompts_file": prompts_file,
                "images": images,
                "num_inference_steps": num_inference_steps,
                "iterations": iterations,
                "batch_size": batch_size,
                "learning_rate": learning_rate,
                "rank": rank,
                "seed": seed,
                "minutes": minutes,
            }
        )
    return TrainingOutput(weights=Path(weights))
