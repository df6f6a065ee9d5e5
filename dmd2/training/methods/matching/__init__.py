"""What leads a student by teacher and fake score otherwise than DMD2; its steps, GAN and time scales stay."""
