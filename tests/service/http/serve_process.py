"""`dmd2 serve` in a process of its own, as the README says, and what its log holds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import httpx

from tests.service.cog.cog_server import START, wait_for


class ServeProcess:
    """Its log and its temporary files are in `folder`."""

    def __init__(self, folder: Path, *options: str) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.temporary, self._log = folder / "temporary", folder / "log"
        self.temporary.mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DMD2_", "COG_"))}
        environment = kept | {"TMPDIR": str(self.temporary), "CUDA_VISIBLE_DEVICES": ""}
        command = [str(Path(sys.executable).with_name("dmd2")), "serve", "--port", str(self.port), *options]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        self.url = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=self.url, timeout=300)

    @property
    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait_until_ready(self) -> None:
        def ready() -> bool:
            assert self.process.poll() is None, f"the server ended:\n{self.log}"
            try:
                return self.client.get("/readyz").status_code == 200
            except httpx.TransportError:
                return False

        wait_for(ready, "/readyz", START)

    def close(self) -> None:
        self.client.close()
        self.process.kill()
        self.process.wait(60)
