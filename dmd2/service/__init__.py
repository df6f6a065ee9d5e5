"""What answers over HTTP. `images`: from a request to files, for any server; `cog`: Cog's."""
