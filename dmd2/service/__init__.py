"""What answers over HTTP. `images`: from a request to files, for any server; `cog`: Cog's; `http`: for clients of
OpenAI's and AUTOMATIC1111's APIs."""
