"""`dmd2 serve`: images over HTTP for clients that exist, without Cog."""
