"""One folder a family of networks (`stable_diffusion`, `edm`), and what is put on them (`adapters`)."""
